from __future__ import annotations

import json
from typing import Any

import pytest
from store_factory import COCO_ANNOTATIONS

from detr_lightning.model.detr.official import OFFICIAL
from detr_lightning.model.labels import coco_ids, coco_names, names_of_config


def test_coco_names_are_those_of_the_annotations() -> None:
    if not COCO_ANNOTATIONS.is_file():
        pytest.skip(f"{COCO_ANNOTATIONS} is not there")
    content = json.loads(COCO_ANNOTATIONS.read_text())
    assert coco_names() == {category["id"]: category["name"] for category in content["categories"]}


def test_official_names_leave_out_the_gaps() -> None:
    names = OFFICIAL["detr_resnet50"].category_names
    assert (len(names), names[1], names[90]) == (80, "person", "toothbrush")
    assert not {0, 12, 26, 91} & names.keys()
    panoptic = OFFICIAL["detr_resnet101_panoptic"].category_names
    assert (len(panoptic), panoptic[1], panoptic[187]) == (133, "person", "sky-other-merged")


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({}, None),
        (None, None),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
        ({"0": "N/A", "1": "person", "12": "N/A"}, {1: "person"}),
        ({0: "table"}, {0: "table"}),
    ],
)
def test_names_of_a_config(id2label: Any, names: dict[int, str] | None) -> None:
    assert names_of_config({"id2label": id2label}) == names


@pytest.mark.parametrize("id2label", [["person"], {"one": "person"}])
def test_odd_names_of_a_config(id2label: Any) -> None:
    with pytest.raises(ValueError, match="id2label"):
        names_of_config({"id2label": id2label})


def test_ids_of_coco() -> None:
    coco = coco_names()
    assert coco_ids(coco, 91) == tuple(range(91))
    contiguous = dict(enumerate(coco.values()))
    assert coco_ids(contiguous, 80) == tuple(coco)
    assert coco_ids(contiguous | {3: "motorbike", 4: "aeroplane"}, 80) == tuple(coco)
    assert coco_ids(contiguous | {0: "persons"}, 80) is None
    assert coco_ids({0: "table", 1: "table rotated"}, 2) is None
    assert coco_ids(None, 7) == tuple(range(7))
