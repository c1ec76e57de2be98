"""What `dsv4 doctor` says: whether an engine loads a folder, rule by rule."""
