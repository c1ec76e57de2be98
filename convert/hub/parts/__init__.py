"""A checkpoint on a hub for `dsv4 run`: the parts that are needed are fetched once, and kept on disk."""
