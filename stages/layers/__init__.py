"""What layers of every family are made of."""
