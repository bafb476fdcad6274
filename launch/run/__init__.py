"""A run from the command line: its start, its records, its signals."""
