from __future__ import annotations

from typing import Any

import pytest

from detr_lightning.model.image_processor import sides_of


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ({"height": 64, "width": 96}, {"short_side": None, "long_side": None, "height": 64, "width": 96}),
        ({"shortest_edge": 480, "longest_edge": 600}, {"short_side": 480, "long_side": 600}),
        ({"shortest_edge": 480, "longest_edge": None, "height": None}, {"short_side": 480, "long_side": None}),
    ],
)
def test_sides(size: dict[str, Any], sides: dict[str, Any]) -> None:
    assert sides_of(size) == sides


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 64}, "size is .* must be height and width, or shortest_edge with longest_edge"),
        ({"shortest_edge": 480, "max_height": 600}, "must be height and width"),
        ({"height": 0, "width": 96}, "must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_planned(size: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sides_of(size)
