"""What runs on a rank: the keeper, the process that it starts, and the loop inside that."""
