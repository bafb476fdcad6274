"""The client's side: prompts, templates, tokens to text, results; the Python API."""
