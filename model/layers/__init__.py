"""The layers of the architecture, each a class that reads its weights by name."""
