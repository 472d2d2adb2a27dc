"""The progress of a run: a Rich bar in a terminal and in notebooks, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from detr_lightning.errors import count
from detr_lightning.extraction.writer import EmbeddingWriter

EVERY = 10.0
"""Seconds between plain lines, at the beginning; later lines come at each tenth of the work at the most."""


class ImageProgress(ProgressBar):
    """Counts images rather than batches, with images/s, MB/s written and the time left. Rank 0 shows its own share."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._enabled = True
        self._bar: Progress | None = None
        self._total = 0
        self._seen = 0
        self._started = 0.0
        self._said = 0.0

    def disable(self) -> None:
        """Show nothing: Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._start(trainer, trainer.predict_dataloaders, "Extracting")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's images."""
        writers = [callback for callback in trainer.callbacks if isinstance(callback, EmbeddingWriter)]  # type: ignore[attr-defined]
        self._advance(batch, sum(writer.bytes_written for writer in writers))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._start(trainer, trainer.val_dataloaders, "Validating")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's images."""
        self._advance(batch, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _start(self, trainer: Trainer, loader: Any, what: str) -> None:
        if not self._enabled:
            return
        self._total = loader.dataset.num_images
        self._seen, self._started = 0, time.monotonic()
        self._said = self._started
        if trainer.world_size > 1:
            what += f" (rank 0 of {trainer.world_size})"
        if not self.console.is_terminal and not self.console.is_jupyter:
            self.console.print(f"{what}: {count(self._total, 'image')} to go", highlight=False)
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("images"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.add_task(what, total=self._total, rate="")
        self._bar.start()

    def _advance(self, batch: dict[str, Any], written: int) -> None:
        if not self._enabled:
            return
        self._seen += len(batch["image_id"]) + len(batch["failed"])
        now = time.monotonic()
        elapsed = now - self._started
        rate = f"{self._seen / elapsed:.1f} images/s"
        if written:
            rate += f", {written / elapsed / 1e6:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._seen, rate=rate)
        elif now - self._said > max(EVERY, elapsed / 10) and self._seen < self._total:
            self._said = now
            left = elapsed / self._seen * (self._total - self._seen)
            self.console.print(f"{self._seen} of {self._total} images, {rate}, {left:.0f} s left", highlight=False)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
