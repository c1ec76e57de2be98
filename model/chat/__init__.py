"""Turns messages into prompts and tokens into answers."""
