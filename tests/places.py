"""Where things lie: the repository, and what may lie beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""A sample of COCO, and outputs of the official code. Tests that need them skip where they are not."""
