"""The Lance table: its columns, and images to rows and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")

from detr_lightning.errors import InputError
from detr_lightning.format import columns, object_store, table
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.keys import KEYS, FeatureSizes, ModelShape, dtype_of, shape_of
from detr_lightning.format.schema import RunRecord

SHAPE = ModelShape(feature_channels=8, hidden_dim=16, encoder_layers=2, decoder_layers=3, num_queries=5, num_logits=7)


def record(**settings: Any) -> RunRecord:
    model = ModelRecord(weights="random", sha256="0" * 64, architecture=vars(SHAPE))
    given = {"keys": KEYS, "dtype": "float32", "preprocessing": {}, "batching": "exact", "precision": "32-true"}
    return RunRecord(extract_type="all", settings=RunSettings(model=model, **{**given, **settings}))


def entry(image_id: int, features: FeatureSizes) -> ImageEntry:
    return ImageEntry(image_id, f"{image_id}.jpg", 64, 48, (96, 128), features)


def tensors(features: FeatureSizes, dtype: str = "float32") -> dict[str, torch.Tensor]:
    return {key: torch.randn(shape_of(key, SHAPE, features)).to(dtype_of(key, dtype)) for key in KEYS}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("fixed", [False, True])
def test_tensors_come_back_bit_for_bit(dtype: str, fixed: bool) -> None:
    torch.manual_seed(0)
    sizes = [(3, 4)] * 3 if fixed else [(3, 4), (1, 2), (5, 1)]
    maps = [FeatureSizes.single(size) for size in sizes]
    schema = columns.table_schema(record(dtype=dtype, preprocessing={"height": 96} if fixed else {}), maps[0])
    written = [tensors(features, dtype) for features in maps]
    rows = [(entry(number, features), written[number]) for number, features in enumerate(maps)]
    skipped = (SkippedImage(9, "9.jpg", "empty file"), {})
    batch = columns.to_batch(schema, [*rows[:1], skipped, *rows[1:]])
    for number, place in ((0, 0), (1, 2), (2, 3)):
        for key in KEYS:
            column = object_store.pa.chunked_array([batch[key].slice(place, 1)])
            (read,) = columns.to_tensors(column, [written[number][key].shape])
            assert read.dtype == written[number][key].dtype
            assert torch.equal(read, written[number][key])
    assert all(batch[key][1].as_py() is None for key in KEYS)
    assert batch["error"].to_pylist() == [None, "empty file", None, None]


def test_entries_come_back(tmp_path: Path) -> None:
    several = FeatureSizes(((4, 4), (2, 2)), (1, 1))
    for features, folder in ((FeatureSizes.single((3, 4)), tmp_path / "one"), (several, tmp_path / "several")):
        schema = columns.table_schema(record(keys=("pred_boxes",)), features)
        kept = replace(entry(6, features), num_queries=2, image_sha256="0" * 64, orientation=6)
        entries = [entry(4, features), SkippedImage(5, "5.jpg", "not an image"), kept]
        made = table.Table.create(folder, schema)
        made.append(table.write_rows(folder, schema, [(one, {}) for one in entries]))
        assert [one for one, _ in table.Table(folder).entries()] == entries
        assert [one for one, _ in table.Table(folder).entries(skipped=True)] == entries[1:2]
        assert made.record == record(keys=("pred_boxes",))


def test_the_table_of_another_program_is_refused(tmp_path: Path) -> None:
    assert not object_store.exists(tmp_path)
    object_store.lance.write_dataset(object_store.pa.table({"x": [1]}), object_store.table_uri(tmp_path))
    with pytest.raises(InputError, match="another program's Lance dataset"):
        table.Table(tmp_path)


@pytest.mark.parametrize(
    ("place", "reason", "advice"),
    [
        ("s3://bucket/out", "status 501 Not Implemented: If-None-Match", "needs conditional writes"),
        ("s3://bucket/out", "incompatible with concurrent transaction UpdateConfig", "Run the same command again"),
        ("s3://bucket/out", "403 Forbidden", "the server denies access .*Check AWS_ACCESS_KEY_ID"),
        ("s3://bucket/out", "dns error", "Check the address and the credentials"),
        ("out", "No space left on device", "Free some space"),
    ],
)
def test_errors_of_lance_come_with_advice(place: str, reason: str, advice: str) -> None:
    with pytest.raises(OSError, match=advice), object_store.explained(place):
        raise OSError(reason)
