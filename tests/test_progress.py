"""The bar of a run, at several widths of the terminal."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from detr_lightning.progress import ImageProgress, clock, speed


def test_rates_and_durations() -> None:
    assert [speed(30, 10), speed(2, 10), speed(5, 0), speed(0, 5)] == ["3.0 images/s", "5.0 s/image", "", ""]
    assert [clock(7.4), clock(61), clock(3723)] == ["0:07", "1:01", "1:02:03"]


def run(width: int, images: int, world_size: int = 1, fail: bool = False) -> str:
    """Return what a terminal of this width gets, of a run over forty images."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    loader = SimpleNamespace(dataset=SimpleNamespace(num_images=40))
    trainer: Any = SimpleNamespace(world_size=world_size, predict_dataloaders=loader, callbacks=[])
    progress, module = ImageProgress(console), Any
    progress.on_predict_start(trainer, module)
    for image in range(images):
        # One of the images cannot be read: the bar counts it too.
        batch = {"image_id": [image] if image else [], "failed": [] if image else [(0, "broken")]}
        progress.on_predict_batch_end(trainer, module, None, batch, image)
    if fail:
        progress.on_exception(trainer, module, KeyboardInterrupt())
    else:
        progress.on_predict_end(trainer, module)
    output = console.file.getvalue()
    return re.sub(r"\x1b\[\??\d*[A-Za-z]", "", output).replace("\r", "\n")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_is_whole_at_each_width(width: int, ranks: int) -> None:
    lines = [line.rstrip() for line in run(width, 12, ranks).splitlines() if "images" in line]
    assert lines
    for line in lines:
        assert len(line) <= width
        assert "…" not in line
    assert "12/40 images" in lines[-1]
    assert re.search(r"images/s .*left \d+:\d\d", lines[-1])
    assert ("elapsed" in lines[-1]) == (width > 80)
    assert lines[-1].startswith("Rank 0 of 2" if ranks == 2 else "Extracting")


def test_the_time_left_is_there_from_the_second_image_on() -> None:
    assert "left" not in run(80, 1)
    assert "left" in run(80, 2)


def test_one_line_remains_after_an_interruption() -> None:
    last = run(80, 12, fail=True).rstrip().splitlines()[-1]
    assert last == "12 of 40 images"
