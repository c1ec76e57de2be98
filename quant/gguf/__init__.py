"""Orders of bytes that GGUF files have and the release has not. NumPy arrays, and compiled code."""
