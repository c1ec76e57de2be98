"""dsv4: convert DeepSeek-V4 checkpoints, prove that nothing changed, and run them."""

__version__ = "0.1.0"
