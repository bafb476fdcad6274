"""The HTTP server: OpenAI's API over one pipeline, whose driver is a process of its own."""
