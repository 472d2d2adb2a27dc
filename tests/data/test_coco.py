"""The reader of COCO JSON: the forms that a value may take, and what has no meaning."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_lightning.data.coco import read_coco_file
from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import InputError


def annotation(**changes: Any) -> dict[str, Any]:
    entry = {"id": 5, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3.5, 4], "area": 9, "iscrowd": 0}
    return {name: value for name, value in (entry | changes).items() if value is not ...}


def document(*annotations: Any, **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 8, "height": 6}],
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "person"}],
    } | changes


def write(folder: Path, content: Any) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": "7"},
        {"category_id": " 1 "},
        {"image_id": 7.0, "category_id": 1.0},
        {"bbox": ["1", "2", "3.5", "4"]},
        {"area": "9"},
        {"area": "9.0e0"},
        *({"iscrowd": value} for value in (None, ..., "", False, "0", 0.0)),
        *({"id": value} for value in (0, -1, None, ..., "3f0e5f2a-9f0b-4f0c-8f56-1b2c3d4e5f60", [1])),
    ],
)
def test_what_has_one_meaning_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    (read,) = read_coco_file(write(tmp_path, document(annotation(**changes))), "boxes").annotations
    expected = annotation(**{name: value for name, value in changes.items() if name == "id"})
    assert read == expected
    assert [type(read[name]) for name in ("image_id", "category_id", "iscrowd")] == [int] * 3


@pytest.mark.parametrize("area", [None, ..., ""])
def test_a_missing_area_is_the_boxs(tmp_path: Path, area: Any) -> None:
    (read,) = read_coco_file(write(tmp_path, document(annotation(area=area))), "boxes").annotations
    assert read["area"] == 14


@pytest.mark.parametrize(
    "box", [[0, 0, 0, 5], [-20, -20, 9000, 9000]], ids=["without extent, as COCO itself has", "beyond the image"]
)
def test_odd_boxes_that_are_boxes(tmp_path: Path, box: list[int]) -> None:
    (read,) = read_coco_file(write(tmp_path, document(annotation(bbox=box))), "boxes").annotations
    assert read["bbox"] == box


nan, infinity = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"image_id": value}, "'image_id' is") for value in (None, "seven", 7.5, True, [7], nan, "\uff17", "7_0")),
        *(({"category_id": value}, "'category_id' is") for value in (None, "person", nan, infinity)),
        ({"category_id": ...}, "'category_id' is missing"),
        ({"category_id": 2}, "unknown category 2"),
        ({"bbox": ...}, "'bbox' is missing"),
        *(
            ({"bbox": value}, "'bbox' is")
            for value in (None, [], [1, 2, 3], [1, 2, 3, 4, 5], {"x": 1}, "1 2 3 4", [1, 2, None, 4], [1, 2, True, 4])
        ),
        *(({"bbox": [1, 2, value, 4]}, "'bbox' is") for value in (nan, infinity, -3, 10**400, "nan", "1e999", "")),
        *(({"area": value}, "'area' is") for value in (nan, infinity, -1, "big", "nan", [9], True)),
        *(({"iscrowd": value}, "'iscrowd' is") for value in (2, -1, "yes", nan, [0])),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, document(annotation(id=4), annotation(**changes)))
    with pytest.raises(InputError, match=rf"a\.json: annotations\[1\] \(id 5\).*{message}"):
        read_coco_file(path, "boxes")
    assert read_coco_file(path).annotations == []  # Images are found all the same.


@pytest.mark.parametrize("entry", [None, 5, "box", []])
def test_annotations_that_are_none(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(InputError, match=r"annotations\[0\] is .* must be an object"):
        read_coco_file(write(tmp_path, document(entry)), "boxes")


def test_a_place_without_an_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"annotations\[0\]: 'bbox' is None"):
        read_coco_file(write(tmp_path, document(annotation(id=..., bbox=None))), "boxes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": None}, "no list 'annotations'"),
        ({"annotations": {"1": {}}}, "no list 'annotations'"),
        ({"categories": []}, "'categories' is missing"),
        ({"categories": None}, "'categories' is missing"),
    ],
)
def test_lists_that_are_missing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_coco_file(write(tmp_path, document(annotation()) | changes), "boxes")


def test_numbers_as_text_in_images_and_categories(tmp_path: Path) -> None:
    images = [{"id": "7", "file_name": "a.jpg", "width": "8", "height": 6.0}]
    content = document(annotation(image_id="7"), images=images, categories=[{"id": "1", "name": "person"}])
    read = read_coco_file(write(tmp_path, content), "boxes")
    assert read.images == [ImageRecord(7, "a.jpg", 8, 6)]
    assert read.categories == {1: "person"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_unicode(tmp_path: Path, encoding: str) -> None:
    content = document(annotation(), categories=[{"id": 1, "name": "Kühlschrank"}])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    read = read_coco_file(path, "boxes")
    assert read.categories == {1: "Kühlschrank"}
    assert len(read.annotations) == 1
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="latin-1")
    with pytest.raises(InputError, match="Save it as UTF-8"):
        read_coco_file(path)


def test_every_field_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, document(annotation(segmentation=[[1, 2, 3, 4, 5, 6]], weather="rain")))
    assert read_coco_file(path, "whole").annotations[0]["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    read = read_coco_file(path, "boxes").annotations[0]
    assert "segmentation" not in read
    assert read["weather"] == "rain"


def test_ground_truth_is_of_the_images_asked_for(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 8, "height": 6} for number in (7, 8, 9)]
    read = read_coco_file(write(tmp_path, document(annotation(), annotation(image_id=8), images=images)), "boxes")
    truth = read.ground_truth([9, 8])
    assert truth["images"] == [{"id": 8}, {"id": 9}]
    assert [entry["image_id"] for entry in truth["annotations"]] == [8]
    with pytest.raises(InputError, match="no annotations for any of the 1 images"):
        read.ground_truth([9])


def test_annotations_that_are_not_wanted_take_no_memory(tmp_path: Path) -> None:
    polygon = [random.Random(0).random() for _ in range(200)]
    path = write(tmp_path, document(*(annotation(segmentation=[polygon]) for _ in range(300))))
    tracemalloc.start()
    read_coco_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * path.stat().st_size  # Bytes and text; the numbers alone would be three times as much.


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([1, 2, 3, 4])


@settings(max_examples=300, deadline=None)
@given(
    entry=st.fixed_dictionaries(
        {"image_id": st.just(7) | values, "category_id": st.just(1) | values, "bbox": st.lists(values, max_size=5)},
        optional={"id": values, "area": values, "iscrowd": values, "segmentation": values},
    )
    | values
)
def test_any_annotation_is_read_or_refused_clearly(tmp_path_factory: pytest.TempPathFactory, entry: Any) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"), document(entry))
    try:
        (read,) = read_coco_file(path, "boxes").annotations
    except InputError as error:
        assert "annotations[0]" in str(error)  # noqa: PT017
        return
    assert all(abs(number) < 1e13 for number in (*read["bbox"], read["area"]))
    assert read["iscrowd"] in (0, 1)
