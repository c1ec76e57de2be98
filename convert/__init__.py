"""The files: reading a checkpoint, planning its conversion, writing the result, proving it."""
