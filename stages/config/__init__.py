"""A model's config.json, as transformers reads it."""
