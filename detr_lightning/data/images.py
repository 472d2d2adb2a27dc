"""The images of a run: those chosen from a source, their sizes, and those that cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from detr_lightning.data.folder_images import FolderImages
from detr_lightning.data.headers import HeaderReader, measure
from detr_lightning.data.records import Failure, ImageRecord, Size
from detr_lightning.data.selection import read_image_ids, select
from detr_lightning.data.sources import (
    COCOImages,
    ImageSource,
    Known,
    with_known_size,
)
from detr_lightning.errors import DETRLightningWarning, SettingError, UnreadableImageError, count


class Images(NamedTuple):
    """The images of a run.

    Attributes:
        records: Those that the model will see, by id, with their sizes.
        failures: Those whose header cannot be read, or whose shape the model cannot take, and why.
        categories: The name of each category id, where the source has them.
    """

    records: list[ImageRecord]
    failures: list[Failure]
    categories: dict[int, str]


@dataclass(frozen=True)
class Choice:
    """The images to take: settings of `COCODataModule`."""

    image_ids: list[int | str] | str | None = None
    limit: int | None = None
    shuffle_seed: int | None = None
    exif: str = "ignore"
    max_image_pixels: int | None = None
    on_error: str = "raise"

    def find(
        self,
        source: ImageSource,
        resize: Callable[[Size], Size],
        known: Mapping[str, Known],
        every_header: bool = False,
    ) -> Images:
        """Return the images of a run, with warnings where a user may expect other ones.

        Args:
            source: Where they come from.
            resize: The size that the model sees, from an image's; it raises a `SettingError` for an impossible shape.
            known: Images of earlier runs by file name; see `ImageSource.find`.
            every_header: Read the headers of images whose size is known too.

        Raises:
            FileNotFoundError: The folder or the annotation file is not there.
            InputError: What they hold cannot be used; the message names the entry.
            SettingError: The settings name no image, or one that is not there.
            UnreadableImageError: There are failures, and `on_error` is `raise`.
        """
        records = source.find(known)
        if isinstance(source, COCOImages):
            source.check_folder(records)
        wanted = read_image_ids(self.image_ids) if isinstance(self.image_ids, str) else self.image_ids
        chosen = select(records, wanted, self.limit, self.shuffle_seed)
        if self.exif == "apply":  # Annotations may state the size before or after turning.
            chosen = [with_known_size(record, known) for record in chosen]
        reader = HeaderReader(source, self.max_image_pixels, self.exif)
        measured, unreadable = measure(reader, chosen, every_header)
        misfits = {record.image_id: (record, reason) for record in measured if (reason := _misfit(resize, record))}
        usable = [record for record in measured if record.image_id not in misfits]
        failures = sorted([*unreadable, *misfits.values()], key=lambda failure: failure[0].image_id)
        if failures and self.on_error == "raise":
            record, reason = failures[0]
            raise unreadable_image(source, record.file_name, reason)
        self._warn(source, usable)
        return Images(usable, failures, source.categories)

    def _warn(self, source: ImageSource, records: list[ImageRecord]) -> None:
        if isinstance(source, FolderImages) and source.images_left_out:
            warnings.warn(
                f"{source.image_dir} has images whose extension is not read: {source.images_left_out}. "
                "They are left out; convert them, or rename what is a JPEG.",
                DETRLightningWarning,
                stacklevel=2,
            )
        turned = sum(record.orientation > 1 for record in records)
        if turned and self.exif == "ignore":
            warnings.warn(turned_message(turned, len(records)), DETRLightningWarning, stacklevel=2)


def _misfit(resize: Callable[[Size], Size], record: ImageRecord) -> str | None:
    """Return why the model cannot take an image of this shape, if it cannot."""
    try:
        resize(record.size)
    except SettingError as error:
        return str(error)
    return None


def turned_message(turned: int, total: int) -> str:
    """Return how many images a viewer shows otherwise than they are read here."""
    return (
        f"{turned} of {count(total, 'image')} have an EXIF tag by which viewers turn them. They are read as stored, as "
        "the official code does, so boxes drawn in a viewer do not fit. data.exif=apply turns them."
    )


def unreadable_image(source: ImageSource, file_name: str, reason: str) -> UnreadableImageError:
    """Return the error that ends a run at an image that cannot be read."""
    place, skip = "", "on_error='skip'"
    if isinstance(source, FolderImages | COCOImages):
        place, skip = f" in {source.image_dir}", "data.on_error=skip"
    return UnreadableImageError(
        f"{file_name!r}{place}: {reason}. Repair or remove it, or leave it out: {skip}.", reason
    )
