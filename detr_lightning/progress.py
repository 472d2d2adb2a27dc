"""The progress of a run: a Rich bar in terminals and notebooks, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from detr_lightning.errors import count
from detr_lightning.extraction.writer import EmbeddingWriter

EVERY = 10.0
"""The minimum number of seconds between plain lines; later, at least a tenth of the elapsed time."""


class ImageProgress(ProgressBar):
    """A progress bar that counts images, with images/s, MB/s written and the time left. Rank 0 shows its own share."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._enabled = True
        self._bar: Progress | None = None
        self._total = 0
        self._seen = 0
        self._started = 0.0
        self._printed = 0.0

    def disable(self) -> None:
        """Show nothing. Lightning calls this on all ranks except rank 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        self._start(trainer, trainer.predict_dataloaders, "Extracting")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Count a batch's images."""
        writers = [callback for callback in trainer.callbacks if isinstance(callback, EmbeddingWriter)]  # type: ignore[attr-defined]
        self._advance(batch, sum(writer.bytes_written for writer in writers))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the bar."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        self._start(trainer, trainer.val_dataloaders, "Validating")

    on_validation_batch_end = on_predict_batch_end
    on_validation_end = on_predict_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the terminal, and print one line in place of the bar."""
        if self._bar is not None:
            self._bar.live.transient = True
            self._stop()
            self.console.print(f"{self._seen} of {count(self._total, 'image')}", highlight=False)

    def _start(self, trainer: Trainer, loader: Any, title: str) -> None:
        if not self._enabled:
            return
        self._total = loader.dataset.num_images
        self._seen, self._started = 0, time.monotonic()
        self._printed = self._started
        if trainer.world_size > 1:
            title = f"Rank 0 of {trainer.world_size}"
        if not self.console.is_terminal and not self.console.is_jupyter:
            self.console.print(f"{title}: {count(self._total, 'image')} to go", highlight=False)
            return
        self._bar = Progress(*columns(self.console.width), console=self.console)
        self._bar.add_task(title, total=self._total, speed="", written="", left="")
        self._bar.start()

    def _advance(self, batch: dict[str, Any], written: int) -> None:
        if not self._enabled:
            return
        self._seen += len(batch["image_id"]) + len(batch["failed"])
        now = time.monotonic()
        elapsed = now - self._started
        rate = speed(self._seen, elapsed)
        bytes_rate = f"{decimal(round(written / elapsed))}/s" if written and elapsed else ""
        # The time of the first image includes the warm-up.
        left = clock(elapsed / self._seen * (self._total - self._seen)) if self._seen > 1 else ""
        if self._bar is not None:
            left = f"left {left}" if left else ""
            self._bar.update(self._bar.task_ids[0], completed=self._seen, speed=rate, written=bytes_rate, left=left)
        elif now - self._printed > max(EVERY, elapsed / 10) and self._seen < self._total:
            self._printed = now
            parts = (f"{self._seen} of {self._total} images", rate, bytes_rate, f"{left} left" if left else "")
            self.console.print(", ".join(filter(None, parts)), highlight=False)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def columns(width: int) -> list[ProgressColumn]:
    """Return the columns of the bar that fit into a terminal of this width."""
    parts: list[ProgressColumn] = [TextColumn("{task.description}")]
    if width >= 72:
        parts.append(BarColumn(bar_width=None))
    parts += [MofNCompleteColumn(), TextColumn("images"), TextColumn("{task.fields[speed]}")]
    if width >= 100:
        parts.append(TextColumn("{task.fields[written]}"))
    if width >= 88:
        parts += [TextColumn("elapsed"), TimeElapsedColumn()]
    return [*parts, TextColumn("{task.fields[left]}")]


def speed(images: int, seconds: float) -> str:
    """Return the speed in images/s, or in s/image if it is below one; empty if there is nothing to measure."""
    if not images or seconds <= 0:
        return ""
    return f"{images / seconds:.1f} images/s" if images >= seconds else f"{seconds / images:.1f} s/image"


def clock(seconds: float) -> str:
    """Return a duration such as `0:07` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
