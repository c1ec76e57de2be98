"""`dsv4`, `python -m dsv4` and `torchrun -m dsv4` start here."""

from dsv4 import signals


def main() -> None:
    """Have Ctrl-C end the process from the first moment, quietly; then import the command line and run it."""
    signals.prepare()
    from dsv4 import cli

    cli.main()


if __name__ == "__main__":
    main()
