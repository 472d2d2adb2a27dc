"""The images of a folder: which files count, and their ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_lightning.data.folder_images import FolderImages
from detr_lightning.data.headers import HeaderReader, measure
from detr_lightning.data.records import Failure, ImageRecord


def save(folder: Path, name: str, size: tuple[int, int] = (8, 6)) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def read_folder(folder: Path, known: dict[str, int] | None = None) -> tuple[list[ImageRecord], list[Failure]]:
    source = FolderImages(folder)
    return measure(
        HeaderReader(source), source.find({name: ImageRecord(n, name, 0, 0) for name, n in (known or {}).items()})
    )


def test_integers_are_ids(tmp_path: Path) -> None:
    save(tmp_path, "000000000139.png", (30, 20))
    save(tmp_path, "sub/12.PNG")
    save(tmp_path, "0000000000000007.png")
    records, failures = read_folder(tmp_path)
    assert [(record.image_id, record.file_name) for record in records] == [
        (7, "0000000000000007.png"),
        (12, "sub/12.PNG"),
        (139, "000000000139.png"),
    ]
    assert records[2].size == (20, 30)
    assert failures == []


@pytest.mark.parametrize(("first", "second"), [("01.png", "1.png"), ("1.bmp", "1.png"), ("a/1.png", "b/1.png")])
def test_one_id_for_two_files(tmp_path: Path, first: str, second: str) -> None:
    save(tmp_path, first)
    save(tmp_path, second)
    with pytest.raises(ValueError, match=f"'{first}' and '{second}' both have the id 1"):
        read_folder(tmp_path)


def test_others_are_numbered_by_path(tmp_path: Path) -> None:
    names = ["a-b/1.png", "a/2.bmp", "a/b/3.tif", "a/b/4.webp", "b.tiff", "c.jpeg", "d.JPG", "x1.png"]
    for name in reversed(names):
        save(tmp_path, name)
    for hidden in (".hidden.png", ".folder/a.png", "a/.b/c.png", "notes.txt", "png"):
        path = tmp_path / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    records, _ = read_folder(tmp_path)
    assert [(record.image_id, record.file_name) for record in records] == list(enumerate(names, 1))


@pytest.mark.parametrize("name", ["1234567890123.png", "-1.png", "1.0.png", "²3.png", "\uff11.png", "1e3.png"])
def test_what_is_no_integer(tmp_path: Path, name: str) -> None:
    save(tmp_path, name)
    save(tmp_path, "55.png")
    assert sorted(record.image_id for record in read_folder(tmp_path)[0]) == [1, 2]


def test_unreadable_headers_do_not_stop_it(tmp_path: Path) -> None:
    save(tmp_path, "2.png")
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"no image")
    (tmp_path / "4.jpg").symlink_to(tmp_path / "gone.jpg")
    records, failures = read_folder(tmp_path)
    assert records == [ImageRecord(2, "2.png", 8, 6)]
    assert [record for record, _ in failures] == [ImageRecord(n, f"{n}.jpg", 0, 0) for n in (1, 3, 4)]
    reasons = [reason for _, reason in failures]
    assert reasons[:2] == ["empty file (0 bytes)", "not an image, or its header is broken"]
    assert reasons[2] == "no such file"


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"No images in .* looked for \.jpg, .*\.tiff"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_folder(tmp_path / "nowhere")


def test_linked_folders(tmp_path: Path) -> None:
    save(tmp_path, "images/sub/1.png")
    save(tmp_path, "other/2.png")
    (tmp_path / "images/again").symlink_to("sub")
    (tmp_path / "images/loop").symlink_to(".")
    assert [record.file_name for record in read_folder(tmp_path / "images")[0]] == ["sub/1.png"]
    (tmp_path / "images/out").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=r"'out' in .* is a symbolic link out of that folder"):
        read_folder(tmp_path / "images")
    (tmp_path / "images/out").unlink()
    save(tmp_path, "images/sub/.store/deep/3.png")
    (tmp_path / "images/more").symlink_to("sub/.store/deep")
    with pytest.raises(ValueError, match=r"'more' in .* is a symbolic link to a hidden folder: .*deep\. Move"):
        read_folder(tmp_path / "images")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, {"a.png": 1, "b.png": 2, "c.png": 3}),
        ({"b.png": 1, "c.png": 2}, {"a.png": 3, "b.png": 1, "c.png": 2}),
        ({"b.png": 2}, {"a.png": 1, "b.png": 2, "c.png": 3}),
        ({"gone.png": 1, "c.png": 7}, {"a.png": 2, "b.png": 3, "c.png": 7}),
    ],
)
def test_known_files_keep_their_numbers(tmp_path: Path, known: dict[str, int], expected: dict[str, int]) -> None:
    for name in expected:
        save(tmp_path, name)
    records, _ = read_folder(tmp_path, known)
    assert {record.file_name: record.image_id for record in records} == expected
    assert records == sorted(records, key=lambda record: record.image_id)


def test_known_integers_keep_their_ids_beside_a_name(tmp_path: Path) -> None:
    save(tmp_path, "5.png")
    assert read_folder(tmp_path)[0][0].image_id == 5
    save(tmp_path, "a.png")
    records, _ = read_folder(tmp_path, {"5.png": 5})
    assert [(record.image_id, record.file_name) for record in records] == [(1, "a.png"), (5, "5.png")]
    (tmp_path / "a.png").unlink()
    save(tmp_path, "9.png")
    records, _ = read_folder(tmp_path, {"5.png": 5, "a.png": 1})
    assert [(record.image_id, record.file_name) for record in records] == [(2, "9.png"), (5, "5.png")]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_folders_get_one_id_a_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    stems = st.sampled_from(["1", "2", "03", "a", "b", "c", "sub/1", "sub/d", "10", "1234567890123"])
    names = [f"{stem}.png" for stem in data.draw(st.lists(stems, min_size=1, max_size=5, unique=True))]
    folder = tmp_path_factory.mktemp("folder")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    known = data.draw(st.lists(stems, max_size=4, unique=True))
    try:
        first = {record.file_name: record.image_id for record, _ in read_folder(folder)[1]}
        numbers = {f"{stem}.png": first.get(f"{stem}.png", 500 + n) for n, stem in enumerate(known)}
        _, failures = read_folder(folder, numbers)
    except ValueError as error:
        assert "both have the id" in str(error)  # noqa: PT017
        return
    again = {record.file_name: record.image_id for record, _ in failures}
    assert sorted(again) == sorted(names)
    assert len(set(again.values())) == len(names)
    assert all(again[name] == number for name, number in numbers.items() if name in again)
