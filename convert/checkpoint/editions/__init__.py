"""The editions of DeepSeek-V4: what a config says in whichever words, and which tensors follow from it."""
