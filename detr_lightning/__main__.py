"""`python -m detr_lightning`: the command. cli.py and `detr-lightning` begin here, too."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, and return its exit code."""
    try:
        from detr_lightning.command.cli import main as command  # takes seconds, in which Ctrl-C deserves no traceback
    except KeyboardInterrupt:
        print("Error: Interrupted before anything was done.", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    raise SystemExit(main())
