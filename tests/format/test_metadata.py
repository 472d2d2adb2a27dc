"""`metadata.json` is read line by line where this program wrote it, and whole where it has another form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.files import write_json
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.keys import FeatureSizes
from detr_lightning.format.metadata import read_metadata
from detr_lightning.format.names import METADATA
from detr_lightning.format.schema import Metadata, RunRecord

RUN = RunRecord(
    extract_type="decoder",
    settings=RunSettings(
        model=ModelRecord(weights="a", sha256="0", architecture={}),
        keys=("query_embeddings",),
        dtype="float32",
        preprocessing={"short_side": 800},
        batching="exact",
        precision="32-true",
    ),
)
IMAGE = ImageEntry(7, "a.jpg", 64, 48, (480, 640), FeatureSizes.single((15, 20)), 1000)


def test_a_large_metadata_file_opens_without_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [replace(IMAGE, image_id=i, file_name=f'{i}",\n  ],\n.jpg') for i in range(1, 40)]
    failed = [SkippedImage(100, "b.jpg", "empty file")]
    write_json(tmp_path / METADATA, Metadata(run=RUN, images=images, failed=failed).to_json(), checksum=True)
    with monkeypatch.context() as patch:
        patch.setattr("detr_lightning.format.metadata.ImageEntry.from_json", None)
        metadata = read_metadata(tmp_path)
        assert metadata.image_ids == list(range(1, 40))
        assert metadata.settings == RUN.settings
        assert metadata.failed() == failed
        assert not metadata.changed
        assert "content" not in vars(metadata)
    assert metadata.entry(39) == images[-1]
    assert [entry["id"] for entry in metadata.entries()] == [*range(1, 40), 100]
    assert "content" not in vars(metadata)
    assert metadata.content["images"] == json.loads((tmp_path / METADATA).read_bytes())["images"]


@pytest.mark.parametrize("form", [None, 2])
def test_metadata_in_another_form_reads_the_same(tmp_path: Path, form: int | None) -> None:
    images = [replace(IMAGE, image_id=i) for i in (1, 2)]
    content = Metadata(run=RUN, images=images).to_json()
    (tmp_path / METADATA).write_text(json.dumps(content, indent=form))
    metadata = read_metadata(tmp_path)
    assert [metadata.entry(i) for i in metadata.image_ids] == images
    assert [ImageEntry.from_json(entry) for entry in metadata.entries()] == images


def test_entries_in_another_order_than_the_ids_are_refused(tmp_path: Path) -> None:
    images = [replace(IMAGE, image_id=i) for i in (1, 2)]
    content = {**Metadata(run=RUN, images=images).to_json(), "image_ids": [2, 1]}
    write_json(tmp_path / METADATA, content)
    with pytest.raises(InputError, match="its entry is that of image 2"):
        read_metadata(tmp_path).entry(1)
    content["image_ids"] = [1]
    write_json(tmp_path / METADATA, content)
    with pytest.raises(InputError, match="does not list the images of image_ids"):
        read_metadata(tmp_path)
