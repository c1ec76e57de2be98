"""Reading a checkpoint: container, index, config, names, layouts. The only room of convert/ that model/ may use."""
