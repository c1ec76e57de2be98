"""Drafts: tokens that the checkpoint's own draft stages propose, and that the main model checks several at a time."""
