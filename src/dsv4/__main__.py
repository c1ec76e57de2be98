"""`python -m dsv4` (and `torchrun -m dsv4`) is the `dsv4` command."""

from dsv4.cli import main

if __name__ == "__main__":
    main()
