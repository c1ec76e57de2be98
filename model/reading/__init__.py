"""Reads weights from the files: checks on their bytes, mapped memory, reads ahead of use."""
