"""A recorded run: in memory, in files, on one clock, in numbers."""
