"""Files of an image folder: found under any Unicode form of their name, opened inside the folder, listed."""

from __future__ import annotations

import contextlib
import os
import threading
import unicodedata
from pathlib import Path

import pytest

from detr_lightning.data.files import find_file, list_images, open_file
from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import UnreadableImageError


def content(folder: Path, name: str) -> bytes:
    with open_file(folder, ImageRecord(1, name, 8, 6)) as file:
        return file.read()


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("annotated", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["Kühlschrank.png", "café/señal.png", "한글.png", "plain.png"])
def test_a_name_in_another_normal_form_is_found(tmp_path: Path, on_disk: str, annotated: str, name: str) -> None:
    path = tmp_path / unicodedata.normalize(on_disk, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"here")
    assert content(tmp_path, unicodedata.normalize(annotated, name)) == b"here"


def test_folders_and_names_of_different_forms(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301").mkdir()
    (tmp_path / "cafe\u0301" / "se\xf1al.png").write_bytes(b"here")
    assert content(tmp_path, "caf\xe9/sen\u0303al.png") == b"here"


def test_the_exact_name_wins(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.png")).write_bytes(form.encode())
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system keeps one form alone")
    assert content(tmp_path, "e\u0301.png") == b"NFD"
    assert find_file(tmp_path, "gone-é.png") == str(tmp_path / "gone-é.png")


def test_a_file_that_becomes_a_link_while_it_is_opened_gives_nothing_from_outside(tmp_path: Path) -> None:
    images, secret = tmp_path / "images", tmp_path / "secret"
    (images / "sub").mkdir(parents=True)
    (images / "real").mkdir()
    secret.mkdir()
    for folder in (images / "real", images / "sub"):
        (folder / "a.png").write_bytes(b"inside")
    (secret / "a.png").write_bytes(b"outside")
    swapped, spare = images / "swapped.png", tmp_path / "spare"
    swapped.write_bytes(b"inside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            spare.symlink_to(secret / "a.png")
            os.replace(spare, swapped)
            spare.write_bytes(b"inside")
            os.replace(spare, swapped)
            os.rename(images / "sub", images / "aside")
            os.symlink(secret, images / "sub")
            os.unlink(images / "sub")
            os.rename(images / "aside", images / "sub")

    thread = threading.Thread(target=swap)
    thread.start()
    seen: set[bytes] = set()
    try:
        for _ in range(1500):
            for name in ("swapped.png", "sub/a.png"):
                with contextlib.suppress(UnreadableImageError, FileNotFoundError):
                    seen.add(content(images, name))
    finally:
        stop.set()
        thread.join()
    assert b"inside" in seen
    assert b"outside" not in seen


def test_what_cannot_be_opened_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(UnreadableImageError, match="Permission denied"):
        content(tmp_path, "a.png")


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.heic", "sub/d.HEIC", "e.jfif", "notes", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names, left_out = list_images(tmp_path, (".jpg", ".png"))
    assert names == ["a.JPG", "b.png"]
    assert left_out == {".heic": 2, ".jfif": 1, "": 1}
