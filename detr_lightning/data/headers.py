"""Sizes and orientations, read from the headers of image files, and hashes of the files."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from detr_lightning.data.decode import turned_size
from detr_lightning.data.formats import open_image, read_content
from detr_lightning.data.records import Failure, ImageRecord
from detr_lightning.data.sources import ImageSource
from detr_lightning.errors import InputError, UnreadableImageError
from detr_lightning.parallel import in_threads

READERS = 8
"""The number of threads that read headers."""


@dataclass(frozen=True)
class HeaderReader:
    """Reads sizes and orientations from headers.

    Args:
        source: The source of the images.
        max_pixels: See `open_image`.
        exif: With `apply`, sizes are those of the turned images; see `read_image`.
    """

    source: ImageSource
    max_pixels: int | None = None
    exif: str = "ignore"

    def __call__(self, record: ImageRecord) -> tuple[ImageRecord, str | None]:
        """Return an image with its size and orientation, or, if the header cannot be read, as given with the reason."""
        try:
            file = self.source.open(record)
            with contextlib.ExitStack() as stack:
                if not isinstance(file, str | os.PathLike | Image.Image):
                    stack.enter_context(file)
                image = stack.enter_context(open_image(file, self.max_pixels))
                width, height, orientation = turned_size(image, self.exif)
                return replace(record, width=width, height=height, orientation=orientation), None
        except UnreadableImageError as error:
            return record, error.reason
        except FileNotFoundError:
            return record, "no such file"


def measure(
    reader: HeaderReader, records: Sequence[ImageRecord], everything: bool = False
) -> tuple[list[ImageRecord], list[Failure]]:
    """Read the headers of images whose size is unknown, in parallel, with a progress bar if it takes long.

    Args:
        reader: Reads a header.
        records: The images.
        everything: Read the headers of all images, for their orientation. Known sizes are kept.

    Returns:
        The images with their sizes, in the given order; and those whose header cannot be read, each with the reason.
    """
    unknown = [record for record in records if everything or not record.width]
    read = dict(
        zip(
            (record.image_id for record in unknown),
            in_threads(reader, unknown, READERS, "Reading headers"),
            strict=True,
        )
    )
    measured, failures = [], []
    for record in records:
        found, reason = read.get(record.image_id, (record, None))
        if reason is None:
            measured.append(replace(record, orientation=found.orientation) if record.width else found)
        else:
            failures.append((found, reason))
    return measured, failures


def hash_files(source: ImageSource, records: Sequence[ImageRecord]) -> dict[int, str]:
    """Return the sha256 of the images' files by id, read in parallel. Images in memory are left out.

    Raises:
        InputError: A file cannot be read; the message names it.
    """

    def sha256(record: ImageRecord) -> str | None:
        try:
            file = source.open(record)
            if isinstance(file, Image.Image):
                return None
            with contextlib.nullcontext() if isinstance(file, str | os.PathLike) else file:
                return hashlib.sha256(read_content(file)).hexdigest()
        except (FileNotFoundError, UnreadableImageError) as error:
            raise InputError(
                f"{error}. data.fingerprint content also compares the files of finished images: restore the file, or "
                "use data.fingerprint=names."
            ) from error

    hashes = in_threads(sha256, records, READERS, "Hashing images")
    return {record.image_id: found for record, found in zip(records, hashes, strict=True) if found is not None}
