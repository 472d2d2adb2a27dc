from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet
from store_factory import annotations_of, edit_metadata, make_store

from detr_lightning.analysis import reader, tables
from detr_lightning.analysis.matching import match
from detr_lightning.analysis.objects import objects, write, write_objects
from detr_lightning.analysis.overlap import OUTCOMES
from detr_lightning.store import EmbeddingStore


def write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("rows", [1, 4, 8192])
def test_the_file_holds_the_table(
    store: EmbeddingStore, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(reader, "_BLOCK", 1)  # An image at a time: groups of rows are made of several.
    monkeypatch.setattr(tables, "ROWS", rows)
    annotations = write_json(tmp_path / "instances.json", content)
    path = write_objects(store, tmp_path / "made" / "objects.parquet", annotation_file=annotations)
    read = pd.read_parquet(path)
    table = objects(store, annotation_file=annotations)
    assert list(read) == list(table)
    for name in ("bbox", "embedding"):
        assert np.array_equal(np.stack(read[name]), np.stack(table[name]))
    rest = [name for name in table if name not in ("bbox", "embedding")]
    pd.testing.assert_frame_equal(read[rest], table[rest], check_dtype=False)
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == {1: 4, 4: 2, 8192: 1}[rows]
    assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float>[16]"
    assert json.loads(file.schema_arrow.metadata[tables.SOURCE])["threshold"] == 0.7
    # The same types, whichever way the table was written.
    other = parquet.read_schema(write(table, tmp_path / "frame.parquet"))
    assert other.field("embedding").type == file.schema_arrow.field("embedding").type


def test_each_detection_has_its_outcome(content: dict[str, Any], tmp_path: Path) -> None:
    def annotation(number: int, category_id: int, x: float, **more: Any) -> dict[str, Any]:
        return {"id": number, "image_id": 7, "category_id": category_id, "bbox": [x, 100, 50, 50], "area": 2500} | more

    content = annotations_of(1, 0)
    detected = [annotation(number, 1, x) for number, x in enumerate((0, 100, 200, 300, 400, 500, 101))]
    store = make_store(tmp_path / "store", content | {"annotations": detected})
    annotated = [
        annotation(10, 1, 0),
        annotation(11, 1, 100),  # Two detections lie on it.
        annotation(12, 3, 200),  # A car, not a person.
        annotation(13, 1, 330),  # 20 / 80 of overlap.
        annotation(14, 3, 430),  # As little, and another category.
        annotation(15, 1, 490, bbox=[480, 80, 150, 150], iscrowd=1),
    ]
    path = write_json(tmp_path / "instances.json", content | {"annotations": annotated})
    table = objects(store, annotation_file=path)
    likelier, other = (6, 1) if table.score[6] > table.score[1] else (1, 6)
    outcomes = dict(zip(table["query"], table.outcome, strict=True))
    assert outcomes == {
        0: "matched",
        likelier: "matched",
        2: "classification",
        3: "localization",
        4: "both",
        5: "crowd",
        other: "duplicate",
    }
    assert table.annotation_id.tolist() == [10, 11, 12, 13, 14, 15, 11]
    assert table.annotated_category.tolist() == ["person", "person", "car", "person", "car", "person", "person"]
    assert table.iou.tolist() == pytest.approx([1, 1, 1, 0.25, 0.25, 1, 49 / 51], abs=1e-3)
    assert set(outcomes.values()) | {"background"} == set(OUTCOMES)
    table = objects(store, annotation_file=write_json(path, content | {"annotations": annotated[:1]}))
    assert table.outcome.tolist() == ["matched"] + ["background"] * 6
    assert table.annotation_id[1:].isna().all()
    assert table.annotated_category_id.dtype == "Int64"
    stricter = objects(store, annotation_file=write_json(path, content | {"annotations": annotated}), iou=0.99)
    assert stricter.outcome[6] == "localization"


@pytest.mark.parametrize(
    ("first", "second"), [("a1", "2"), (2**63, "2"), (-(2**70), "2"), (1.5, "2"), (None, "2"), (2**63 - 1, 2)]
)
def test_annotation_ids_may_be_of_any_type(
    store: EmbeddingStore, content: dict[str, Any], tmp_path: Path, first: Any, second: Any
) -> None:
    content["annotations"][0]["id"] = first
    annotations = write_json(tmp_path / "instances.json", content)
    expected = [str(first) if first and isinstance(second, str) else first, second]
    for path in (
        write_objects(store, tmp_path / "streamed.parquet", annotation_file=annotations),
        write(objects(store, annotation_file=annotations), tmp_path / "objects.parquet"),
        write(match(store, annotations).annotated, tmp_path / "matched.parquet"),
    ):
        assert parquet.read_table(path)["annotation_id"].to_pylist()[:2] == expected


def test_fields_of_annotations_may_be_objects(store: EmbeddingStore, content: dict[str, Any], tmp_path: Path) -> None:
    content["annotations"][0]["attributes"] = {"occluded": True}
    content["annotations"][1]["attributes"] = ["blurred"]
    content["annotations"][2]["attributes"] = None  # The others have no such field.
    table = match(store, write_json(tmp_path / "instances.json", content)).annotated
    read = parquet.read_table(write(table, tmp_path / "matched.parquet"))["attributes"]
    assert read.to_pylist() == ['{"occluded": true}', '["blurred"]', *[None] * 10]


def test_nothing_found_is_an_empty_file(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"scores 1\.0 or more; the best is 0\.9"):
        path = write_objects(store, tmp_path / "objects.parquet", 1.0)
    read = parquet.read_table(path)
    assert len(read) == 0
    assert read.schema == parquet.read_schema(write_objects(store, tmp_path / "b.parquet")).with_metadata(
        read.schema.metadata
    )


def test_images_of_which_no_query_was_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", annotations_of(objects=0), num_queries=0)
    edit_metadata(store.folder, min_score=0.9)
    store = EmbeddingStore(store.folder)
    message = r"keeps no query of {}: none scored 0\.9 or more\. Extract .* lower writer\.min_score"
    with pytest.warns(UserWarning, match=message.format("4 images")):
        assert objects(store, 0.9).empty
    with pytest.warns(UserWarning, match=message.format("1 image")):
        write_objects(store, tmp_path / "objects.parquet", 0.95, image_ids=[7])


def test_a_store_without_images(tmp_path: Path) -> None:
    store = make_store(tmp_path / "none", annotations_of(0))
    with pytest.warns(UserWarning, match="No image of"):
        assert objects(store).empty
    with pytest.warns(UserWarning, match="No image of"):
        assert len(parquet.read_table(write_objects(store, tmp_path / "objects.parquet"))) == 0


def test_where_the_table_may_go(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not end in \.parquet. Name the file a\.parquet"):
        write_objects(store, tmp_path / "a.csv")
    with pytest.raises(ValueError, match="the extraction's own folder"):
        write_objects(store, store.folder / "a.parquet")
    (tmp_path / "a.parquet").write_text("before")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_objects(store, tmp_path / "a.parquet", overwrite=False)
    store.path(37).unlink()  # The last image: the file must not appear half.
    with pytest.raises(FileNotFoundError, match="was removed"):
        write_objects(store, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").read_text() == "before"
    assert not list(tmp_path.glob(".*"))
