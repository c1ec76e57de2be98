"""How weights come from the files into memory: checked on their bytes, into mapped memory, ahead of their use."""
