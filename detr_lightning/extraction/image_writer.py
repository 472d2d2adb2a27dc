"""The threads that write images to disk while the model computes the next ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

from detr_lightning.batch import HostBatch, image_at, keep_queries, sizes_of_batch, to_stored
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.format.keys import QUERY_INDEX, FeatureSizes, dtype_of
from detr_lightning.system import SideThreads

QUEUED_IMAGES = 64
"""The most images that may wait to be written. Beyond that the model waits for the disk, and memory stays bounded."""


class ImageWriter:
    """Writes the images of each batch in background threads.

    Args:
        run: The run that saves them.
        threads: How many images are written at once.
        keys: The model's keys.
        dtype: `writer.dtype`.
        min_score: `writer.min_score`.
        scoring: The model's scoring: `softmax` or `sigmoid`.
        finished: The ids of images that are not written again. With padding they share batches with others.

    Attributes:
        images_written: The number of images written so far.
        bytes_written: Their size on disk in bytes.
    """

    def __init__(
        self,
        run: PlannedRun,
        threads: int,
        keys: Sequence[str],
        dtype: str,
        min_score: float | None,
        scoring: str,
        finished: Collection[int] = frozenset(),
    ) -> None:
        self._run = run
        self._finished = finished
        self._keys, self._dtype, self._min_score, self._scoring = keys, dtype, min_score, scoring
        self.images_written = 0
        self.bytes_written = 0
        self._count = threading.Lock()
        self._pool = SideThreads(threads, "writer")
        self._waiting: deque[Future[None]] = deque()

    def submit(self, prediction: Any) -> None:
        """Hand a batch to the threads; block only if too many images are waiting already.

        Raises:
            OSError: An earlier image could not be written.
            InputError: A value of an earlier image is not finite, or does not fit into `dtype`.
        """
        arrived = HostBatch(prediction)
        images = zip(prediction["image_id"], sizes_of_batch(prediction), strict=True)
        for index, (image_id, features) in enumerate(images):
            if image_id not in self._finished:
                self._waiting.append(self._pool.submit(self._write, index, image_id, features, arrived))
        self.wait(QUEUED_IMAGES)

    def wait(self, allowed: int = 0) -> None:
        """Wait until no more than `allowed` images are waiting.

        Raises:
            OSError, InputError: As for `submit`.
        """
        while self._waiting and (len(self._waiting) > allowed or self._waiting[0].done()):
            self._waiting.popleft().result()

    def close(self) -> None:
        """Drop the waiting images, and finish those being written."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def _write(self, index: int, image_id: int, features: FeatureSizes, arrived: HostBatch) -> None:
        arrived.wait()
        tensors = image_at(index, arrived.tensors, features)
        if self._min_score is not None:
            kept = keep_queries(image_id, tensors, self._min_score, self._scoring)
            tensors = {key: kept[key] for key in (*self._keys, QUERY_INDEX)}
        stored = {key: to_stored(key, image_id, tensor, dtype_of(key, self._dtype)) for key, tensor in tensors.items()}
        size = self._run.save(image_id, stored, features)
        with self._count:
            self.images_written += 1
            self.bytes_written += size
