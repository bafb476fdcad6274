"""Runs on virtual time."""
