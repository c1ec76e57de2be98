"""One module per command: declares its options and calls the packages below."""
