"""What others measured and published of GPUs, read and fitted: for the scripts of bench/ alone."""
