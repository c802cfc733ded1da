"""From what a model writes to what it means: thoughts, calls of tools, and plain text."""
