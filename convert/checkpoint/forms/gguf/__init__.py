"""GGUF with llama.cpp's architecture `deepseek4`: the file format, the names, the keys, and how values are stored."""
