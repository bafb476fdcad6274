"""A model's files: found, fetched, converted, and read by stage."""
