"""What only the CPU does: its own kernels (C, in kernels/), packed weights, attention in place."""
