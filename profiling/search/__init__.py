"""The best rate, placement or recipe, by many simulated runs."""
