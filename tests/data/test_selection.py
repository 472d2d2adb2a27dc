"""The choice of images: by ids, by names, by number, at random."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr_lightning.data.records import ImageRecord
from detr_lightning.data.selection import read_image_ids, select
from detr_lightning.errors import InputError

RECORDS = tuple(ImageRecord(n, f"{n}.jpg", 8, 6) for n in (30, 10, 20))


def test_subsets() -> None:
    ids = [record.image_id for record in select(RECORDS)]
    assert ids == [10, 20, 30]
    assert [record.image_id for record in select(RECORDS, limit=2)] == [10, 20]
    assert [record.image_id for record in select(RECORDS, limit=9)] == [10, 20, 30]
    assert [record.image_id for record in select(RECORDS, image_ids=[30, 10, 30])] == [10, 30]
    assert [record.image_id for record in select(RECORDS, image_ids=[30, 10], limit=1)] == [10]


def test_file_names_choose_too() -> None:
    assert [record.image_id for record in select(RECORDS, image_ids=["20.jpg", 10])] == [10, 20]
    with pytest.raises(ValueError, match=r"'3.jpg', but no image has that file name\. Did you mean '30.jpg'"):
        select(RECORDS, image_ids=["3.jpg"])


def test_a_random_subset_is_always_the_same() -> None:
    many = [ImageRecord(n, f"{n}.jpg", 8, 6) for n in range(100)]
    chosen = select(many, limit=10, shuffle_seed=1)
    assert chosen == select(many[::-1], limit=10, shuffle_seed=1)
    assert chosen == sorted(chosen, key=lambda record: record.image_id)
    assert chosen not in (many[:10], select(many, limit=10, shuffle_seed=2))
    with pytest.raises(ValueError, match=r"set data\.limit too"):
        select(many, shuffle_seed=1)


def test_a_file_of_ids_and_names(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("\ufeff30\n\n 10.jpg \n", encoding="utf-8")
    assert read_image_ids(path) == [30, "10.jpg"]
    with pytest.raises(FileNotFoundError, match=r"data\.image_ids names .*gone\.txt"):
        read_image_ids(tmp_path / "gone.txt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text"):
        read_image_ids(path)


@pytest.mark.parametrize(
    ("image_ids", "limit", "message"),
    [
        ([10, 11], None, "names 1 id that no image has: 11. Nearest to 11: 10 and 20"),
        ([1, 2, 3, 4, 5, 6], None, r"names 6 ids that no image has: 1, 2, 3, 4, 5, \.\.\.\. Nearest to 1: 10"),
        ([99], None, "Nearest to 99: 30"),
        ([], None, r"data\.image_ids is empty"),
        (None, 0, r"data\.limit is 0"),
        (None, -3, r"data\.limit is -3"),
    ],
)
def test_refusals(image_ids: list[int] | None, limit: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(RECORDS, image_ids, limit)
