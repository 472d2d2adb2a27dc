"""The command `detr-lightning` in a clone: `python cli.py predict --config configs/decoder.yaml`."""

from detr_lightning.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
