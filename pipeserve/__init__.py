"""pipeserve."""
