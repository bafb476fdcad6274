"""What only the CPU does: oneDNN's packed weights and few shapes, attention in blocks."""
