"""`python -m detr_lightning`, the same as `detr-lightning` and `python cli.py`."""

from __future__ import annotations

from detr_lightning.command.main import main

if __name__ == "__main__":
    raise SystemExit(main())
