"""What a data worker does: read the images of a batch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from detr_lightning.data.batching import Size, collate
from detr_lightning.data.files import UnreadableImageError, locate
from detr_lightning.data.images import ImageRecord
from detr_lightning.data.transforms import read_pixels

Batch = list[ImageRecord]
Reader = Callable[[ImageRecord, Size], Tensor]
"""Reads an image at a size: uint8 `[3, height, width]`."""


class ImageBatches(Dataset[dict[str, Any]]):
    """One rank's batches: an item is a whole batch, read from disk.

    Args:
        batches: The images of each batch.
        read: Returns an image's pixels at a size.
        resize: The size of an image after resizing, from its size.
        padded: Whether images of different sizes may share a batch.

    Attributes:
        num_images: The images in all batches.
    """

    def __init__(self, batches: Sequence[Batch], read: Reader, resize: Callable[[Size], Size], padded: bool) -> None:
        self.num_images = sum(map(len, batches))
        self._batches = batches
        self._read = read
        self._resize = resize
        self._padded = padded

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        items, failed = [], []
        for record in self._batches[index]:
            size = self._resize(record.size)
            try:
                items.append((record, self._read(record, size), size))
            except UnreadableImageError as error:
                failed.append((record.image_id, error.reason))
            except FileNotFoundError:
                failed.append((record.image_id, "no such file"))
        return collate(items, self._padded, failed)


def read_file(image_dir: str, backend: str, max_pixels: int | None, record: ImageRecord, size: Size) -> Tensor:
    """Read an image of a folder at a size; see `read_pixels`."""
    return read_pixels(locate(image_dir, record), record, size, backend, max_pixels)


def leave_signals_to_parent(_worker: int) -> None:
    """Let what is sent to a whole group, as Ctrl-C is, be answered in one place: workers end when their parent does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Of the thread that hands pixels over, once the parent is gone. A worker's own errors travel to the parent.
    sys.excepthook = lambda *_error: None


def unwrap(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one batch that a loader of batches has collected."""
    return items[0]
