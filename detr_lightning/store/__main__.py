"""`python -m detr_lightning.store`: an alias of the commands that read a folder."""

from __future__ import annotations

import sys

from detr_lightning.command.store import main

if __name__ == "__main__":
    sys.exit(main())
