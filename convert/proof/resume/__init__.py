"""Continuing a verification that was interrupted."""
