"""Hugging Face and ModelScope: listings, downloads, and a checkpoint that is read from a hub shard by shard."""
