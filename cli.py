"""The command: `python cli.py predict --config configs/decoder.yaml`."""

from detr_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
