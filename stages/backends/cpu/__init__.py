"""A stage on a CPU: its own kernels (C, in kernels/), and how they are found and called."""
