"""What a user sees in the terminal: tables, lines, the live view."""
