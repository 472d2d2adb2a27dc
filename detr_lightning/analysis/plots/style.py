"""The common parts of the pictures: figures, colors, boxes."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from detr_lightning.errors import MissingPackageError

try:
    from matplotlib.figure import Figure as PlainFigure
    from matplotlib.patches import Rectangle
except ImportError as missing:
    raise MissingPackageError("Pictures need matplotlib: pip install 'detr-lightning[analysis]'.") from missing

__all__ = ["INK", "Figure", "color_of", "draw_box", "ink_on"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#222222"
_HUES = ((0, 0.14, 0.28, 0.42, 0.56, 0.72, 0.86, 1), (0, 0.07, 0.14, 0.33, 0.48, 0.6, 0.77, 1))
# Even steps -> hues: red, orange, yellow, green, teal, blue, purple, red. Even steps of hue itself are mostly green.


class Figure(PlainFigure):
    """A figure that notebooks show without pyplot, which would keep it alive and may want a display."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def color_of(category_id: int) -> tuple[float, float, float]:
    """Return a category's color: far from those of the ids next to it, and the same in every picture."""
    hue = float(np.interp((0.1 + 0.61803399 * category_id) % 1.0, *_HUES))
    lightness, saturation = ((0.46, 0.78), (0.60, 0.88), (0.34, 0.62))[category_id % 3]
    return colorsys.hls_to_rgb(hue, lightness, saturation)


def ink_on(color: Sequence[float] | np.ndarray) -> str:
    """Return the more legible text color for a background, by the background's relative luminance."""
    red, green, blue = color
    return INK if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.25 else "white"


def draw_box(axes: Axes, row: Any, color: Any, linewidth: float = 2.0) -> None:
    """Draw the box of a row with the columns `x1`, `y1`, `x2`, `y2`."""
    corner, extent = (row.x1, row.y1), (row.x2 - row.x1, row.y2 - row.y1)
    axes.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=color, linewidth=linewidth))
