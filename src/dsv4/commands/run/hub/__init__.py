"""`dsv4 run` of a checkpoint on a hub: what is fetched, and what that costs."""
