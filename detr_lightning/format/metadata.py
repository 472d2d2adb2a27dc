"""Reads a folder's `metadata.json` and checks the fields that are needed to read its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.files import json_is_unchanged
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.image_lines import ImageLines
from detr_lightning.format.names import ID_DIGITS, MAX_ID, METADATA, RUN, STATE
from detr_lightning.format.schema import FILES, RunRecord, parse_categories

_REQUIRED = ("num_images", "extract_type", "embedding_keys")
"""Without these fields a `metadata.json` cannot be read."""

AGAIN = (
    "Run the same command again to finish it. EmbeddingStore(folder, partial=True) reads the images finished so far, "
    "and detr-lightning summary prints the progress."
)


class MetadataFile:
    """The `metadata.json` of a finished extraction.

    Most of the file consists of the images' entries. This program writes one per line, so each is parsed only when it
    is needed, and a folder of a million images opens at once.

    Args:
        path: The file.
        data: The file's content; by default it is read from `path`.

    Raises:
        InputError: The file is not JSON, or was not written by this program.

    Attributes:
        partial: Whether the extraction is unfinished; the images are then those finished so far.
        num_planned: The number of images that an unfinished extraction will have; None if it is not recorded.
    """

    partial = False
    num_planned: int | None = None

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        self._data = path.read_bytes() if data is None else data
        self._lines: ImageLines | None = None
        if lines := ImageLines.of(self._data):
            header = self._parse(self._data[: lines.begin] + self._data[lines.end :], whole=False)
            if lines.count == len(header["image_ids"]):
                self._header, self._lines = header, lines
        if self._lines is None:
            self._header = self.content

    @cached_property
    def content(self) -> dict[str, Any]:
        """The whole file, parsed."""
        return self._parse(self._data)

    @cached_property
    def _header(self) -> dict[str, Any]:
        """The content, without the images if each has its own line."""
        return self.content

    @cached_property
    def changed(self) -> bool:
        """Whether the file was changed after it was written. False for older metadata without a checksum."""
        return "checksum" in self._header and not json_is_unchanged(self._data)

    def _parse(self, data: bytes, *, whole: bool = True) -> dict[str, Any]:
        path = self.path
        content = parse_metadata(data, path, ("image_ids", *_REQUIRED, "images"))
        ids, images = content["image_ids"], content["images"]
        if not isinstance(ids, list) or not all(type(image_id) is int and 0 <= image_id <= MAX_ID for image_id in ids):
            raise InputError(f"{path}: image_ids is not a list of image ids (integers of at most {ID_DIGITS} digits).")
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            raise InputError(f"{path}: images is not a list of objects.")
        if whole and [image.get("id") for image in images] != ids:
            raise InputError(f"{path}: images does not list the images of image_ids in their order.")
        return content

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images."""
        ids: list[int] = self._header["image_ids"]
        return ids

    @property
    def num_images(self) -> Any:
        """The number of images, as recorded."""
        return self._header["num_images"]

    @property
    def extract_type(self) -> Any:
        """The extract type, as recorded."""
        return self._header["extract_type"]

    @cached_property
    def embedding_keys(self) -> tuple[str, ...]:
        """The keys of each image's file, in the file's order."""
        return tuple(self._header["embedding_keys"])

    @cached_property
    def categories(self) -> dict[int, str]:
        """The names of the categories by logit index; empty if they are not recorded."""
        try:
            return parse_categories(self._header)
        except InputError as error:
            raise InputError(f"{self.path}: {error}.") from error

    @property
    def image_dir(self) -> str | None:
        """The image folder, or None if it is not recorded."""
        value = self._data_setting("image_dir")
        return value if isinstance(value, str) else None

    @property
    def max_image_pixels(self) -> int | None:
        """The number of pixels above which images were refused, or None for Pillow's own limit."""
        value = self._data_setting("max_image_pixels")
        return value if type(value) is int else None

    def _data_setting(self, name: str) -> Any:
        value: Any = self._header
        for part in ("config", "data", name):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def min_score(self) -> float | None:
        """The minimum score of the queries that were kept, or None if all were kept."""
        value = self._header.get("min_score")
        return float(value) if isinstance(value, int | float) else None

    @property
    def layout(self) -> str:
        """The layout of the output: one of `LAYOUTS`."""
        return str(self._header.get("layout", FILES))

    @property
    def model(self) -> ModelRecord | None:
        """The model, or None if it is not recorded.

        Raises:
            InputError: The record is incomplete.
        """
        content = self._header.get("model")
        return None if content is None else ModelRecord.from_json(content)

    @property
    def run(self) -> RunRecord:
        """Everything that is recorded except the images.

        Raises:
            InputError: It is incomplete.
        """
        return RunRecord.from_json(self._header)

    @property
    def settings(self) -> RunSettings:
        """The settings that identify the run.

        Raises:
            InputError: They are incomplete.
        """
        return RunSettings.from_json(self._header)

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {image_id: position for position, image_id in enumerate(self.image_ids)}

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._positions

    def entry(self, image_id: int) -> ImageEntry:
        """Return an image's entry.

        Raises:
            KeyError: There is no such image.
            InputError: Its entry is incomplete.
        """
        position = self._positions[image_id]
        try:
            content = self.content["images"][position] if self._lines is None else self._lines[position]
            entry = ImageEntry.from_json(content)
            if entry.image_id != image_id:
                raise InputError(f"its entry is that of image {entry.image_id}")
        except InputError as error:
            raise InputError(f"{self.path}: image {image_id}: {error}.") from error
        return entry

    def entries(self) -> Iterator[Any]:
        """Yield the JSON objects of the finished and the skipped images, unchecked."""
        yield from self.content["images"] if self._lines is None else self._lines
        yield from self._list("failed")

    def failed(self) -> list[SkippedImage]:
        """Return the skipped images; empty if they are not recorded.

        Raises:
            InputError: One of them is incomplete.
        """
        return [SkippedImage.from_json(entry) for entry in self._list("failed")]

    def _list(self, name: str) -> list[Any]:
        value = self._header.get(name)
        return value if isinstance(value, list) else []


def parse_metadata(data: bytes, path: Path | str, required: Sequence[str] = _REQUIRED) -> dict[str, Any]:
    """Return the content of a `metadata.json`.

    Args:
        data: The file's content.
        path: The file's name in messages.
        required: The fields that it must have; by default those of a table.

    Raises:
        InputError: The file is not JSON, or was not written by this program.
    """
    advice = "Restore it, or remove it and extract again."
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}). {advice}") from error
    if missing := [name for name in required if not isinstance(content, dict) or name not in content]:
        lacks = ", ".join(missing)
        raise InputError(f"{path} was written by another program, or is too old: it lacks {lacks}. {advice}")
    keys = content["embedding_keys"]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path}: embedding_keys is not a list of names. {advice}")
    parsed: dict[str, Any] = content
    return parsed


def read_metadata(folder: Path, *, unfinished: bool = False) -> MetadataFile:
    """Return the metadata of a finished extraction.

    Args:
        folder: The output folder.
        unfinished: Read it even if a later run in the same folder has not finished.

    Raises:
        FileNotFoundError: There is no such folder, or no finished extraction in it.
        InputError: Its `metadata.json` was not written by this program.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {problem}. Give the output folder of an extraction.")
    path = folder / METADATA
    if (folder / STATE / RUN).exists() and not unfinished:
        raise FileNotFoundError(f"{folder} holds an unfinished extraction. {AGAIN}")
    if path.is_file():
        return MetadataFile(path)
    if any(folder.glob("embedding_*.pt")):
        raise FileNotFoundError(
            f"{folder} has embeddings but no {METADATA}: the extraction is unfinished. "
            "Run the same command again to finish it."
        )
    raise FileNotFoundError(f"{folder} has no {METADATA}. Give the output folder of a finished extraction.")
