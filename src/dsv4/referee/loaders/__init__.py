"""`dsv4 doctor --python`: an engine's own loader reads the folder, and its parameters are compared with the folder."""
