"""Reading the `metadata.json` of a folder, checked as far as reading its files needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.files import json_is_unchanged
from detr_lightning.format.names import ID_DIGITS, MAX_ID, METADATA, RUN, STATE
from detr_lightning.format.schema import RunRecord, RunSettings, parse_categories

_REQUIRED = ("image_ids", "num_images", "extract_type", "embedding_keys", "images")
"""Without these fields a `metadata.json` cannot be read."""


class MetadataFile:
    """The `metadata.json` of a finished extraction.

    Args:
        path: The file.

    Attributes:
        content: All of it, as JSON.
        changed: Whether it was changed after it was written. Older metadata does not tell.

    Raises:
        InputError: It is not JSON, or another program's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON ({error}). Restore it, or remove it and extract again.") from error
        missing = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
        if missing:
            raise InputError(f"{path} is another program's or too old: it lacks {', '.join(missing)}.")
        ids, images, keys = content["image_ids"], content["images"], content["embedding_keys"]
        if not isinstance(ids, list) or not all(type(image_id) is int and 0 <= image_id <= MAX_ID for image_id in ids):
            raise InputError(f"{path}: image_ids is not a list of image ids (integers of at most {ID_DIGITS} digits).")
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            raise InputError(f"{path}: images is not a list of objects.")
        if [image.get("id") for image in images] != ids:
            raise InputError(f"{path}: images does not list the images of image_ids in their order.")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise InputError(f"{path}: embedding_keys is not a list of names.")
        self.content: dict[str, Any] = content
        self.changed = "checksum" in content and not json_is_unchanged(data)

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images."""
        ids: list[int] = self.content["image_ids"]
        return ids

    @property
    def num_images(self) -> Any:
        """The number of images, as recorded."""
        return self.content["num_images"]

    @property
    def extract_type(self) -> Any:
        """The extract type, as recorded."""
        return self.content["extract_type"]

    @cached_property
    def embedding_keys(self) -> tuple[str, ...]:
        """The keys of each image's file, in the file's order."""
        return tuple(self.content["embedding_keys"])

    @cached_property
    def categories(self) -> dict[int, str]:
        """The categories' names by logit index; none where they are not recorded."""
        try:
            return parse_categories(self.content)
        except InputError as error:
            raise InputError(f"{self.path}: {error}.") from error

    @property
    def image_dir(self) -> str | None:
        """The folder that the images were in, or None where it is not recorded."""
        value: Any = self.content
        for name in ("config", "data", "image_dir"):
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, str) else None

    @property
    def min_score(self) -> float | None:
        """The score that a query needed to be kept, or None where all were kept."""
        value = self.content.get("min_score")
        return float(value) if isinstance(value, int | float) else None

    @property
    def run(self) -> RunRecord:
        """All that is recorded besides the images.

        Raises:
            InputError: It is incomplete.
        """
        return RunRecord.from_json(self.content)

    @property
    def settings(self) -> RunSettings:
        """The settings that identify the run.

        Raises:
            InputError: They are incomplete.
        """
        return RunSettings.from_json(self.content)

    @cached_property
    def _images(self) -> dict[int, dict[str, Any]]:
        return dict(zip(self.image_ids, self.content["images"], strict=True))

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._images

    def entry(self, image_id: int) -> ImageEntry:
        """Return an image's entry.

        Raises:
            KeyError: There is no such image.
            InputError: Its entry is incomplete.
        """
        content = self._images[image_id]
        try:
            return ImageEntry.from_json(content)
        except InputError as error:
            raise InputError(f"{self.path}: image {image_id}: {error}.") from error

    def entries(self) -> Iterator[Any]:
        """Yield the JSON objects of the images and of the skipped ones, whatever they are."""
        yield from self.content["images"]
        yield from self._list("failed")

    def failed(self) -> list[SkippedImage]:
        """Return the skipped images; none where they are not recorded.

        Raises:
            InputError: One of them is incomplete.
        """
        return [SkippedImage.from_json(entry) for entry in self._list("failed")]

    def _list(self, name: str) -> list[Any]:
        value = self.content.get(name)
        return value if isinstance(value, list) else []


def read_metadata(folder: Path, *, unfinished: bool = False) -> MetadataFile:
    """Return the metadata of a finished extraction.

    Args:
        folder: The output folder.
        unfinished: Read it although a later run on the same folder has not finished.

    Raises:
        FileNotFoundError: There is no such folder, or no finished extraction in it.
        InputError: Its `metadata.json` is not one of this program's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {problem}. Give the output folder of an extraction.")
    path = folder / METADATA
    if (folder / STATE / RUN).exists() and not unfinished:
        raise FileNotFoundError(f"{folder} holds an unfinished extraction. Run the same command again to finish it.")
    if path.is_file():
        return MetadataFile(path)
    if any(folder.glob("embedding_*.pt")):
        raise FileNotFoundError(
            f"{folder} has embeddings but no {METADATA}: the extraction is unfinished. "
            "Run the same command again to finish it."
        )
    raise FileNotFoundError(f"{folder} has no {METADATA}. Give the output folder of a finished extraction.")
