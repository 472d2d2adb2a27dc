"""The record of a run: the content of `metadata.json`.

Only this module, identity.py and entries.py define the names of the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage, get_field
from detr_lightning.format.identity import RunSettings

FILES, LANCE = LAYOUTS = ("files", "lance")
"""The values of `writer.layout`."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that is recorded about a run except its images.

    Attributes:
        extract_type: The requested extract type.
        settings: The settings that identify the run.
        categories: The names of the categories by logit index.
        versions: The versions of the packages that results may depend on.
        config: The settings as given.
    """

    extract_type: str
    settings: RunSettings
    categories: Mapping[int, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, first: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object, with the fields of `first` right after the extract type and the keys."""
        settings = self.settings
        return {
            "extract_type": self.extract_type,
            "embedding_keys": list(settings.keys),
            **(first or {}),
            "categories": {str(index): name for index, name in sorted(self.categories.items())},
            "model": settings.model.to_json(),
            "preprocessing": dict(settings.preprocessing),
            "batching": settings.batching,
            "dtype": settings.dtype,
            "precision": settings.precision,
            **({} if settings.min_score is None else {"min_score": settings.min_score}),
            "versions": dict(self.versions),
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunRecord:
        """Return the record that `to_json` wrote.

        Raises:
            InputError: Fields are missing or have the wrong type; the message names them.
        """
        if missing := [name for name in _RUN_FIELDS if name not in content]:
            raise InputError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        return cls(
            extract_type=get_field(content, "extract_type", str),
            settings=RunSettings.from_json(content),
            categories=parse_categories(content),
            versions=get_field(content, "versions", dict),
            config=get_field(content, "config", dict),
        )


_RUN_FIELDS = (
    *("extract_type", "embedding_keys", "categories", "model", "preprocessing"),
    *("batching", "dtype", "precision", "versions", "config"),
)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of a `metadata.json`.

    Attributes:
        run: Everything except the images.
        images: The finished images, ascending by id.
        failed: The images that were skipped.
        layout: `files`, or `lance` if the images are in a table instead.
    """

    run: RunRecord
    images: Sequence[ImageEntry]
    failed: Sequence[SkippedImage] = ()
    layout: str = FILES

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, starting with the fields that readers look for first."""
        failed = [entry.to_json() for entry in self.failed]
        if self.layout == LANCE:
            return {"num_images": len(self.images), **self.run.to_json(), "failed": failed, "layout": LANCE}
        ids = [entry.image_id for entry in self.images]
        content = self.run.to_json({"images": [entry.to_json() for entry in self.images]})
        return {"image_ids": ids, "num_images": len(ids), **content, "failed": failed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Metadata:
        """Return the metadata that `to_json` wrote.

        Raises:
            InputError: A field is missing or has the wrong type; the message names it.
        """
        return cls(
            run=RunRecord.from_json(content),
            images=[ImageEntry.from_json(entry) for entry in get_field(content, "images", list)],
            failed=[SkippedImage.from_json(entry) for entry in content.get("failed") or ()],
        )


def parse_categories(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of the categories by logit index; empty if they are not recorded.

    Raises:
        InputError: They are not an object, or an index is not a number.
    """
    try:
        return {int(index): str(name) for index, name in (content.get("categories") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise InputError("categories is not an object of names by logit index") from error
