"""What `verify` knows of other tools' forms: their names, and what their configs say. Stated here for itself."""
