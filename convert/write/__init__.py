"""Executes a plan: pieces, shards, journal, manifest. The only room that writes output files."""
