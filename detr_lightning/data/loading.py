"""Data workers: they read the images of a batch."""

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
from detr_lightning.data.records import ImageRecord, Size
from detr_lightning.data.sources import ImageSource
from detr_lightning.errors import SettingError, UnreadableImageError
from detr_lightning.system import SideThreads, available_cores

Batch = list[ImageRecord]
Details = dict[str, Any]
"""Fields of an image's record in the output that are known once its file is read: see `ImageEntry`."""

Reader = Callable[[ImageRecord, Size], tuple[Tensor, Details]]
"""Reads an image at a size: `[3, height, width]`, and its details."""


@dataclass(frozen=True)
class ImageReader:
    """Reads images. It travels to the data workers.

    Args:
        source: Where the images come from.
        backend: See `read_image`, also for the others.
        max_pixels: Likewise.
        exif: Likewise.
        processor: Likewise.
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
                content = read_content(file)  # The bytes that are hashed are those that are decoded.
                details["image_sha256"] = hashlib.sha256(content).hexdigest()
                file = io.BytesIO(content)
            pixels, orientation = read_image(
                file, record, size, self.backend, self.max_pixels, self.exif, self.processor
            )
        if orientation > 1:
            details["orientation"] = orientation
        return pixels, details


SHARED_MEMORY = "/dev/shm"
"""The file system of the memory in which data workers hand over pixels. Docker gives a container 64 MB of it."""

PREFETCHED_BATCHES = 2
"""Batches of each data worker that may be waiting there, as `DataLoader` has it by default."""


def free_shared_memory() -> int | None:
    """Return the bytes of shared memory that are free, or None where there is no such limit."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def data_workers(asked: int | None, device: str, ranks: int, batch_bytes: int) -> int:
    """Return the number of data workers of each rank.

    Args:
        asked: The number that the user set, if any.
        device: The kind of device that the model runs on, such as `cpu`.
        ranks: The ranks on this machine.
        batch_bytes: The pixels of the largest batch.

    Raises:
        SettingError: More were asked for than the shared memory has room for.
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
            f"data.num_workers is {asked}: they need up to {asked * each / 1e6:.0f} MB of shared memory, and "
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free. Use at most {room}, a smaller data.batch_size, or give "
            "the container more: docker run --shm-size=2g."
        )
    return min(most, room)


SECONDS_TO_ANSWER = 5
"""The time that a data worker outlives a SIGTERM."""


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
        batch = self._batches[index]
        sizes = [self._resize(record.size) for record in batch]
        # A data worker is one of several already. Without them the model waits, and leaves its cores free.
        threads = 1 if get_worker_info() else torch.get_num_threads()
        with SideThreads(threads, "reader") as pool:
            read = list(zip(batch, pool.map(self._pixels, batch, sizes), sizes, strict=True))
        items = [(record, found[0], size) for record, found, size in read if not isinstance(found, str)]
        failed = [(record.image_id, found) for record, found, _ in read if isinstance(found, str)]
        details = {record.image_id: found[1] for record, found, _ in read if not isinstance(found, str) and found[1]}
        collated = {**collate(items, self._padded, failed), "details": details}
        if get_worker_info() and isinstance(collated.get("pixels"), Tensor):
            # An error here reaches the main process. Later, in the thread that sends the batch, it would be lost.
            collated["pixels"].share_memory_()
        return collated

    def _pixels(self, record: ImageRecord, size: Size) -> tuple[Tensor, Details] | str:
        """Return an image's pixels and details, or the reason why there are none."""
        try:
            return self._read(record, size)
        except UnreadableImageError as error:
            return error.reason
        except FileNotFoundError:
            return "no such file"


def leave_signals_to_parent(_worker: int) -> None:
    """Ignore signals that are sent to a whole group, such as Ctrl-C: workers end when their parent does.

    A parent that itself ends while a batch iterator is still referenced sends SIGTERM and waits without a limit. A
    worker cannot tell the two apart: it ends, but only when the parent has had the time to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_frame: signal.alarm(SECONDS_TO_ANSWER))
    # Of the thread that hands pixels over, once the parent is gone. A worker's own errors travel to the parent.
    sys.excepthook = lambda *_error: None


def image_loader(images: ImageBatches, workers: int, device: str) -> DataLoader[Any]:
    """Return a loader of batches.

    Args:
        images: The batches of this rank.
        workers: The number of data workers.
        device: The kind of device that the model runs on.
    """
    return DataLoader(
        images,
        # The batches are this rank's already. Lightning leaves a DistributedSampler alone, and would replace any
        # other by one that shares out the shares again.
        sampler=DistributedSampler(images, num_replicas=1, rank=0, shuffle=False),
        batch_size=1,
        collate_fn=_unwrap,
        num_workers=workers,
        # Lance, where embeddings go into a table, does not survive a fork.
        multiprocessing_context="spawn" if workers and "lance" in sys.modules else None,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device == "cuda",
    )


def _unwrap(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]
