"""What a microbatch costs, and what a model and a device are to that: counts in, seconds and bytes out."""
