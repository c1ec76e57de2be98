"""`dsv4 convert`: its options, the work, and what it prints."""
