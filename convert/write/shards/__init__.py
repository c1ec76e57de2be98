"""Writing output shards: several at a time, from pieces that threads compute, in memory that is bounded."""
