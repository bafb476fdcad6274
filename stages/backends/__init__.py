"""What stages compute with: plain PyTorch on any device, and below, a folder for a device's own."""
