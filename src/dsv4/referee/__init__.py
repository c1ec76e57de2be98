"""Compares log-probabilities of running servers with dsv4's own, for given tokens."""
