"""Teacher-forced logits, comparison of two checkpoints, traces."""
