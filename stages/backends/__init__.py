"""What a stage computes with, by the kind of device."""
