"""The architectures: one file each, which composes shared layers and reads as its forward pass."""
