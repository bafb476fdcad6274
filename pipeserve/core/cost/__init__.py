"""What a microbatch costs: counts, model and device in, seconds and bytes out."""
