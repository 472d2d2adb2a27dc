"""Batches: the images in each, the rank that computes it, and its tensor of pixels."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import SettingError, check_choice
from detr_lightning.format.keys import Size

BATCHINGS = ("exact", "padded")
"""The values of `data.batching`."""


def plan_batches(
    records: Iterable[ImageRecord],
    resize: Callable[[Size], Size],
    batch_size: int,
    batching: str = "exact",
    finished: Collection[int] = frozenset(),
    rank: int = 0,
    world_size: int = 1,
) -> list[list[ImageRecord]]:
    """Return the batches of one rank. The result depends only on the arguments, so ranks need not communicate.

    Every unfinished image is in exactly one batch of one rank. Batches are assigned from the largest to the smallest,
    each to the rank with the fewest pixels so far. A rank computes its largest batch first: if memory does not suffice,
    that shows at once.

    Args:
        records: All images of the run.
        resize: Returns the size of an image after resizing, given its size.
        batch_size: The maximum number of images in a batch.
        batching: `exact` batches only images of the same resized size, so that nothing is padded. `padded` takes the
            images in the order of their ids, as the official code does; a finished image then stays in a batch with
            unfinished images, since their results depend on it.
        finished: The ids of the images that need not be computed.
        rank: The rank whose batches to return.
        world_size: The number of ranks.

    Raises:
        SettingError: The batch size is below 1, the batching is unknown, or the rank is not in `world_size`.
    """
    check_choice("data.batching", batching, BATCHINGS)
    if batch_size < 1:
        raise SettingError(f"data.batch_size is {batch_size}, but must be at least 1.")
    if not 0 <= rank < world_size:
        raise SettingError(f"rank is {rank}; with world_size {world_size} it must be from 0 to {world_size - 1}.")
    finished = frozenset(finished)
    records = sorted(records, key=lambda record: record.image_id)
    sizes = {size: resize(size) for size in {record.size for record in records}}
    if batching == "exact":
        batches = _exact(
            [record for record in records if record.image_id not in finished], sizes, batch_size, world_size
        )
    else:
        batches = [
            batch for batch in _chunks(records, batch_size) if any(record.image_id not in finished for record in batch)
        ]
    return _balance(batches, sizes, world_size)[rank]


def collate(
    items: Sequence[tuple[ImageRecord, torch.Tensor, Size]],
    padded: bool = False,
    failed: Iterable[tuple[int, str]] = (),
) -> dict[str, Any]:
    """Join images into one batch.

    Args:
        items: Each image with its pixels, `[3, height, width]`, and their height and width. May be empty.
        padded: Pad smaller images with zeros at the bottom and on the right, and add `padding_mask`. The model has to
            restore these zeros after normalisation.
        failed: The ids of the images that could not be read, each with the reason.

    Returns:
        `image_id` (list), `pixels` (`[B, 3, H, W]` in channels-last memory, uint8 for DETR), `input_size` (list of
        height and width), `failed` (list) and, with `padded`, `padding_mask` (bool `[B, H, W]`, True on padding).

    Raises:
        SettingError: The images differ in size, and `padded` is false.
    """
    sizes = [size for _, _, size in items]
    if not padded and len(set(sizes)) > 1:
        raise SettingError(f"images of different sizes {sorted(set(sizes))} need data.batching padded")
    height, width = (max(sides) for sides in zip(*sizes, strict=True)) if sizes else (0, 0)
    shape = (len(items), height, width, 3)
    dtype = items[0][1].dtype if items else torch.uint8
    pixels = torch.zeros(shape, dtype=dtype) if padded else torch.empty(shape, dtype=dtype)
    mask = torch.ones(shape[:3], dtype=torch.bool) if padded else None
    for index, (_, image, (h, w)) in enumerate(items):
        pixels[index, :h, :w] = image.permute(1, 2, 0)  # [3, h, w] -> [h, w, 3]
        if mask is not None:
            mask[index, :h, :w] = False
    batch: dict[str, Any] = {
        "image_id": [record.image_id for record, _, _ in items],
        "pixels": pixels.permute(0, 3, 1, 2),  # [B, H, W, 3] -> [B, 3, H, W], a view
        "input_size": sizes,
        "failed": list(failed),
    }
    if mask is not None:
        batch["padding_mask"] = mask
    return batch


def _exact(
    records: list[ImageRecord], sizes: dict[Size, Size], batch_size: int, world_size: int
) -> list[list[ImageRecord]]:
    """Group images by resized size. Small groups get smaller batches, so that ranks can share them."""
    groups: defaultdict[Size, list[ImageRecord]] = defaultdict(list)
    for record in records:
        groups[sizes[record.size]].append(record)
    return [
        batch for group in groups.values() for batch in _chunks(group, min(batch_size, -(-len(group) // world_size)))
    ]


def _chunks(records: list[ImageRecord], length: int) -> list[list[ImageRecord]]:
    return [records[start : start + length] for start in range(0, len(records), length)]


def _balance(
    batches: list[list[ImageRecord]], sizes: dict[Size, Size], world_size: int
) -> list[list[list[ImageRecord]]]:
    """Assign each batch, the largest first, to the rank with the fewest pixels so far."""

    def largest_first(batch: list[ImageRecord]) -> tuple[int, Size, int]:
        height, width = (max(sides) for sides in zip(*(sizes[record.size] for record in batch), strict=True))
        return -len(batch) * height * width, (height, width), batch[0].image_id

    shares: list[list[list[ImageRecord]]] = [[] for _ in range(world_size)]
    load = [(0, rank) for rank in range(world_size)]
    for (cost, _, _), batch in sorted(((largest_first(batch), batch) for batch in batches), key=lambda pair: pair[0]):
        pixels, rank = load[0]
        shares[rank].append(batch)
        heapq.heapreplace(load, (pixels - cost, rank))
    return shares
