"""What to change, and what it would give: recorded runs, replayed with one change."""
