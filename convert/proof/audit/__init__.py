"""A look at blocks drawn at random (`verify --sample`): which blocks, and what their equality says of the others."""
