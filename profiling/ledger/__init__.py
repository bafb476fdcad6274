"""Where the time of a recorded run went: idle by cause."""
