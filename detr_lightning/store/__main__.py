"""`python -m detr_lightning.store`, an alias of the `detr-lightning` command."""

from __future__ import annotations

from detr_lightning.command.main import main

if __name__ == "__main__":
    raise SystemExit(main())
