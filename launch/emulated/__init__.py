"""Stages that compute nothing: they wait as long as a device profile says."""
