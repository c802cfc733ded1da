"""OpenAI's Responses API: turns that the server remembers."""
