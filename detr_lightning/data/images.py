"""The images of a run: those selected from a source, their sizes, and those that cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from detr_lightning.data.folder_images import FolderImages
from detr_lightning.data.headers import HeaderReader, measure
from detr_lightning.data.records import Failure, ImageRecord
from detr_lightning.data.selection import read_image_ids, select
from detr_lightning.data.sources import COCOImages, ImageSource, Known
from detr_lightning.errors import DETRLightningWarning, SettingError, UnreadableImageError, count
from detr_lightning.format.keys import Size


class Images(NamedTuple):
    """The images of a run.

    Attributes:
        records: The images that the model will see, by id, with their sizes.
        failures: The images whose header cannot be read or whose shape the model does not accept, with the reasons.
        categories: The name of each category id, if the source has them.
    """

    records: list[ImageRecord]
    failures: list[Failure]
    categories: dict[int, str]


@dataclass(frozen=True)
class Choice:
    """The settings of `COCODataModule` that select images."""

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
        """Return the images of a run, and warn if the user may expect different ones.

        Args:
            source: The source of the images.
            resize: Returns the size that the model sees, given an image's; raises `SettingError` for impossible shapes.
            known: Images of earlier runs by file name; see `ImageSource.find`.
            every_header: Also read the headers of images whose size is known.

        Raises:
            FileNotFoundError: A folder or file that the settings name does not exist, or the folder has none of the
                images.
            InputError: The content of a file cannot be used; the message names the entry.
            SettingError: The settings select no image, or one that does not exist.
            UnreadableImageError: There are failures, and `on_error` is `raise`.
        """
        records = source.find(known)
        if isinstance(source, COCOImages):
            source.check_folder(records)
        wanted = read_image_ids(self.image_ids) if isinstance(self.image_ids, str) else self.image_ids
        chosen = select(records, wanted, self.limit, self.shuffle_seed)
        if self.exif == "apply":  # Annotations may state the size before or after the image is turned.
            chosen = [replace(record, width=0, height=0) for record in chosen]
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
                f"{source.image_dir} has images with unsupported extensions: {source.images_left_out}. "
                "They are left out; convert them, or rename those that are JPEGs.",
                DETRLightningWarning,
                stacklevel=2,
            )
        turned = sum(record.orientation > 1 for record in records)
        if turned and self.exif == "ignore":
            warnings.warn(turned_message(turned, len(records)), DETRLightningWarning, stacklevel=2)


def _misfit(resize: Callable[[Size], Size], record: ImageRecord) -> str | None:
    """Return the reason why the model does not accept an image of this shape, or None if it does."""
    try:
        resize(record.size)
    except SettingError as error:
        return str(error)
    return None


def turned_message(turned: int, total: int) -> str:
    """Return the warning about images that viewers show turned, but that are read as stored."""
    return (
        f"{turned} of {count(total, 'image')} have an EXIF tag by which viewers turn them. They are read as stored, as "
        "in the official code, so boxes drawn in a viewer do not fit. data.exif=apply turns them."
    )


def unreadable_image(source: ImageSource, file_name: str, reason: str) -> UnreadableImageError:
    """Return the error that stops a run at an unreadable image."""
    place, skip = "", "on_error='skip'"
    if isinstance(source, FolderImages | COCOImages):
        place, skip = f" in {source.image_dir}", "data.on_error=skip"
    return UnreadableImageError(
        f"{file_name!r}{place}: {reason}. Repair or remove it, or leave it out: {skip}.", reason
    )
