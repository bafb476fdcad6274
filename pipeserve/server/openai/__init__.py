"""OpenAI's API: what requests may say, and the shapes of the answers."""
