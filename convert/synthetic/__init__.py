"""Small random checkpoints in the release's format, for the demo and for tests."""
