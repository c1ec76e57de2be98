"""What running servers make of a checkpoint: their log-probabilities of given tokens, beside dsv4's own."""
