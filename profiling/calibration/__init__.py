"""From measured times to device profiles."""
