"""Engram, V4.1's n-gram tables: classes of tokens, the hash to table rows, and what a layer does with the rows."""
