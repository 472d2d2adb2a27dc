"""Data workers, which read the images of a batch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from detr_lightning.data.batching import collate
from detr_lightning.data.decode import Processor, read_image
from detr_lightning.data.formats import ImageFile, read_content
from detr_lightning.data.records import ImageRecord
from detr_lightning.data.sources import ImageSource
from detr_lightning.errors import SettingError, UnreadableImageError
from detr_lightning.format.keys import Size
from detr_lightning.system import SideThreads, available_cores

Batch = list[ImageRecord]
Details = dict[str, Any]
"""Fields of an image's record in the output that are known only once its file is read; see `ImageEntry`."""

Reader = Callable[[ImageRecord, Size], tuple[Tensor, Details]]
"""Returns an image's pixels at a size, `[3, height, width]`, and its details."""


@dataclass(frozen=True)
class ImageReader:
    """Reads images. It is sent to the data workers.

    Args:
        source: The source of the images.
        backend: See `read_image`.
        max_pixels: See `read_image`.
        exif: See `read_image`.
        processor: See `read_image`.
        fingerprint: `content` adds the sha256 of the image's file to its details.
    """

    source: ImageSource
    backend: str = "pil"
    max_pixels: int | None = None
    exif: str = "ignore"
    processor: Processor | None = None
    fingerprint: str = "names"

    def __call__(self, record: ImageRecord, size: Size) -> tuple[Tensor, Details]:
        """Return an image's pixels at a size, and its details."""
        details: Details = {}
        file: ImageFile = self.source.open(record)
        with file if isinstance(file, io.IOBase) else contextlib.nullcontext():
            if self.fingerprint == "content" and not isinstance(file, Image.Image):
                content = read_content(file)  # Read once, so that the hashed bytes are the decoded ones.
                details["image_sha256"] = hashlib.sha256(content).hexdigest()
                file = io.BytesIO(content)
            pixels, orientation = read_image(
                file, record, size, self.backend, self.max_pixels, self.exif, self.processor
            )
        if orientation > 1:
            details["orientation"] = orientation
        return pixels, details


SHARED_MEMORY = "/dev/shm"
"""The file system of the shared memory in which data workers pass pixels on. Docker limits it to 64 MB by default."""

PREFETCHED_BATCHES = 2
"""The batches of each data worker that may wait there, by default in `DataLoader`."""


def free_shared_memory() -> int | None:
    """Return the free shared memory in bytes, or None if there is no such limit."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def data_workers(asked: int | None, device: str, ranks: int, batch_bytes: int) -> int:
    """Return the number of data workers of each rank.

    Args:
        asked: The number that the user set, if any.
        device: The kind of device that the model runs on, such as `cpu`.
        ranks: The number of ranks on this machine.
        batch_bytes: The size of the largest batch's pixels, in bytes.

    Raises:
        SettingError: The shared memory has no room for the number that was asked for.
    """
    if asked is None and device == "cpu":
        return 0
    most = max(1, min(8, available_cores() // ranks - 1)) if asked is None else asked
    free = free_shared_memory()
    if not most or free is None:
        return most
    each = PREFETCHED_BATCHES * batch_bytes * ranks
    room = free // max(1, each)
    if asked is not None and asked > room:
        raise SettingError(
            f"data.num_workers is {asked}: they need up to {asked * each / 1e6:.0f} MB of shared memory, but "
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free. Use at most {room}, a smaller data.batch_size, or give "
            "the container more shared memory: docker run --shm-size=2g."
        )
    return min(most, room)


SECONDS_TO_ANSWER = 5
"""The time that a data worker keeps running after a SIGTERM."""


class ImageBatches(Dataset[dict[str, Any]]):
    """One rank's batches: each item is a whole batch, read from disk.

    Args:
        batches: The images of each batch.
        read: Returns an image's pixels at a size, and its details.
        resize: Returns the size of an image after resizing, given its size.
        padded: Whether images of different sizes may share a batch.

    Attributes:
        num_images: The number of images in all batches.
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
        batch = self._batches[index]
        sizes = [self._resize(record.size) for record in batch]
        # Data workers already run in parallel. Without them, the model waits, and its cores are free.
        threads = 1 if get_worker_info() else torch.get_num_threads()
        with SideThreads(threads, "reader") as pool:
            read = list(zip(batch, pool.map(self._pixels, batch, sizes), sizes, strict=True))
        items = [(record, found[0], size) for record, found, size in read if not isinstance(found, str)]
        failed = [(record.image_id, found) for record, found, _ in read if isinstance(found, str)]
        details = {record.image_id: found[1] for record, found, _ in read if not isinstance(found, str) and found[1]}
        collated = {**collate(items, self._padded, failed), "details": details}
        if get_worker_info() and isinstance(collated.get("pixels"), Tensor):
            # An error here reaches the main process. In the thread that sends the batch later, it would be lost.
            collated["pixels"].share_memory_()
        return collated

    def _pixels(self, record: ImageRecord, size: Size) -> tuple[Tensor, Details] | str:
        """Return an image's pixels and details, or the reason why it cannot be read."""
        try:
            return self._read(record, size)
        except UnreadableImageError as error:
            return error.reason
        except FileNotFoundError:
            return "no such file"


def leave_signals_to_parent(_worker: int) -> None:
    """Make a worker ignore signals that are sent to its whole process group, such as Ctrl-C: it ends with its parent.

    A parent that exits while a batch iterator is still referenced also sends SIGTERM, and waits without a time limit.
    A worker cannot distinguish the two, so it ends, but only after the parent has had time to react.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_frame: signal.alarm(SECONDS_TO_ANSWER))
    # Silences the thread that passes pixels on once the parent is gone. A worker's own errors are sent to the parent.
    sys.excepthook = lambda *_error: None


def image_loader(images: ImageBatches, workers: int, device: str) -> DataLoader[Any]:
    """Return a data loader for batches.

    Args:
        images: The batches of this rank.
        workers: The number of data workers.
        device: The kind of device that the model runs on.
    """
    return DataLoader(
        images,
        # The batches are already those of this rank. Lightning would replace any sampler but a DistributedSampler by
        # one that divides them among the ranks again.
        sampler=DistributedSampler(images, num_replicas=1, rank=0, shuffle=False),
        batch_size=1,
        collate_fn=_unwrap,
        num_workers=workers,
        # Lance, which writes tables of embeddings, does not survive a fork.
        multiprocessing_context="spawn" if workers and "lance" in sys.modules else None,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device == "cuda",
    )


def _unwrap(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]
