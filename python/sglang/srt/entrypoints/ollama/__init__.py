"""The part of Ollama's API that its chat clients need."""
