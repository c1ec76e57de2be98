"""The inference engine: the whole DeepSeek-V4 architecture, driven by the checkpoint's own config."""
