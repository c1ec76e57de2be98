"""Number formats and exact comparison of arrays of codes. Knows no files, tensors or names."""
