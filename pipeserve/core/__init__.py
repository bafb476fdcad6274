"""The decisions, pure: no torch, no I/O, no clock, no logging."""
