from __future__ import annotations

import random

import pytest

from detr_lightning.format.preprocessing import Preprocessing, hugging_face_size, resized_size


def test_the_default_is_the_official_rule() -> None:
    assert Preprocessing().input_size((200, 640)) == resized_size((200, 640)) == (417, 1334)
    with pytest.raises(ValueError, match=r"4000x1 \(width x height\) is too thin"):
        Preprocessing().input_size((1, 4000))


def test_a_fixed_size_is_every_images() -> None:
    square = Preprocessing(short_side=None, long_side=None, height=640, width=512)
    assert square.input_size((10, 999)) == (640, 512)
    assert "short_side" not in square.to_json()
    assert square.to_json()["height"] == 640


def test_without_a_long_side_nothing_limits_it() -> None:
    assert Preprocessing(long_side=None).input_size((100, 1000)) == (800, 8000)


def test_transformers_rule_is_its_own() -> None:
    image_transforms = pytest.importorskip("transformers.image_transforms")
    numbers = random.Random(0)
    differ = 0
    for _ in range(3000):
        size = numbers.randint(30, 2500), numbers.randint(30, 2500)
        target = numbers.randint(1, 900), numbers.randint(900, 1500)
        expected = image_transforms.get_size_with_aspect_ratio(size, *target)
        assert hugging_face_size(size, *target) == expected
        assert Preprocessing(*target, processor="Any").input_size(size) == expected
        differ += expected != resized_size(size, *target)
    assert differ > 100
