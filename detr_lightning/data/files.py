"""The files of an image folder: finding, opening and listing them, never outside the folder."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import SettingError, UnreadableImageError


def image_folder(image_dir: str | Path) -> Path:
    """Return the folder as a path.

    Raises:
        FileNotFoundError: It does not exist, or is not a folder.
    """
    folder = Path(image_dir)
    if not image_dir or not folder.is_dir():
        problem = "is empty" if not image_dir else "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"data.image_dir {problem}: {image_dir}")
    return folder


def find_file(image_dir: str | os.PathLike[str], file_name: str) -> str:
    """Return the path of a file in a folder, whether or not it exists.

    A file is also found if its name on disk differs only in Unicode normalisation, as after a copy from a Mac.
    """
    path = os.path.join(image_dir, file_name)
    if file_name.isascii() or os.path.lexists(path):
        return path
    found = os.fspath(image_dir)
    for part in file_name.split("/"):
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found = next((p for p in (os.path.join(found, form) for form in forms) if os.path.lexists(p)), "")
        if not found:
            return path
    return found


def open_file(image_dir: str | os.PathLike[str], record: ImageRecord) -> BinaryIO:
    """Open an image's file, which is inside the folder even if links change while it is being opened.

    Raises:
        FileNotFoundError: The file does not exist.
        UnreadableImageError: A link on the way leads out of the folder, or permission is denied.
    """
    try:
        root = os.path.realpath(image_dir)
        path = os.path.realpath(find_file(root, record.file_name))  # raises if a link changes in between
        if path.startswith(os.path.join(root, "")):
            return open(path, "rb", opener=partial(_open_beneath, root))
        reason = f"a symbolic link leads out of the image folder, to {path}; give the folder with the file itself"
    except PermissionError as error:
        reason = f"cannot be read ({error.strerror})"
    except OSError as error:
        raise FileNotFoundError(f"image {record.image_id} has no file {record.file_name!r} in {image_dir}") from error
    raise UnreadableImageError(f"{record.file_name!r} in {image_dir}: {reason}", reason)


def _open_beneath(root: str, path: str, flags: int) -> int:
    """Open a regular file folder by folder, without following links: all have been resolved."""
    folders = os.path.relpath(path, root).split(os.sep)
    name = folders.pop()
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        file = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(path)
    return file


def list_images(folder: Path, extensions: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """List the images in a folder and its subfolders, without hidden ones.

    Args:
        folder: The folder.
        extensions: The extensions of images, in lower case.

    Returns:
        The relative POSIX paths, sorted; and the number of files with each other extension.

    Raises:
        SettingError: A linked subfolder leads out of the folder or to a hidden one.
    """
    left_out: Counter[str] = Counter()
    return sorted(_walk(folder, extensions, left_out)), left_out


def _walk(folder: Path, extensions: tuple[str, ...], left_out: Counter[str]) -> Iterator[str]:
    pending = [""]
    while pending:
        parent = pending.pop()
        with os.scandir(os.path.join(folder, parent)) as entries:
            for entry in entries:
                name = parent + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + "/")
                elif entry.is_dir():
                    _check_linked_folder(folder, name)
                elif entry.name.lower().endswith(extensions):
                    yield name
                else:
                    left_out[os.path.splitext(entry.name)[1].lower()] += 1


def _check_linked_folder(folder: Path, name: str) -> None:
    """Ignore a linked subfolder whose images are found anyway; refuse one that is outside the folder or hidden."""
    target = os.path.realpath(os.path.join(folder, name))
    parts = os.path.relpath(target, os.path.realpath(folder)).split(os.sep)
    if parts == ["."] or not any(part.startswith(".") for part in parts):
        return
    place = "out of that folder" if parts[0] == ".." else "to a hidden folder"
    raise SettingError(
        f"{name!r} in {folder} is a symbolic link {place}: {target}. "
        "Move it elsewhere, or set data.image_dir to a folder that contains all images itself."
    )
