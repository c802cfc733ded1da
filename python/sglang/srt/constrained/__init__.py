"""Structured output: answers that follow a regex, a JSON schema, a grammar or a structural tag."""
