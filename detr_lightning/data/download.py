"""Download of COCO val2017 from its own server: resumed if it was cut off, verified, then unpacked."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from detr_lightning.errors import SettingError

BASE_URL = "http://images.cocodataset.org/"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """One of COCO's zip files.

    Attributes:
        url: The path under `BASE_URL`.
        size: The size in bytes.
        md5: The checksum, as published by mirrors of COCO; COCO itself publishes none.
        members: The folder or file in the archive to unpack.
    """

    url: str
    size: int
    md5: str
    members: str


IMAGES = Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", "val2017/")
ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip",
    252_907_541,
    "f4bbac642086de4f52a3fdda2de5fa2c",
    "annotations/instances_val2017.json",
)


def download_val2017(image_dir: Path, annotation_file: Path | None) -> None:
    """Download the images and annotations of COCO val2017 if they are missing.

    Args:
        image_dir: The folder for the images; skipped if it exists and is not empty.
        annotation_file: The file for the annotations; skipped if it exists or is None.

    Raises:
        ConnectionError: The download failed; the data received so far is kept, and another call resumes.
        SettingError: The downloaded file is not the one that COCO published.
    """
    if annotation_file is not None:
        with _locked(annotation_file.parent):
            if not annotation_file.exists():
                _unpack_annotations(annotation_file)
    with _locked(image_dir.parent):
        if not image_dir.is_dir() or not any(image_dir.iterdir()):
            _unpack_images(image_dir)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let the ranks of a run into a folder one at a time: the first one downloads, the others find the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack_annotations(annotation_file: Path) -> None:
    archive = _fetch(ANNOTATIONS, annotation_file.parent)
    partial = annotation_file.with_name(annotation_file.name + ".part")
    with zipfile.ZipFile(archive) as content, content.open(ANNOTATIONS.members) as source, open(partial, "wb") as to:
        shutil.copyfileobj(source, to, CHUNK)
    partial.replace(annotation_file)
    archive.unlink()


def _unpack_images(image_dir: Path) -> None:
    archive = _fetch(IMAGES, image_dir.parent)
    partial = image_dir.with_name(image_dir.name + ".part")
    with zipfile.ZipFile(archive) as content:
        content.extractall(partial, [name for name in content.namelist() if name.startswith(IMAGES.members)])
    if image_dir.exists():
        image_dir.rmdir()
    (partial / IMAGES.members).rename(image_dir)
    partial.rmdir()
    archive.unlink()


def _fetch(archive: Archive, folder: Path) -> Path:
    """Download an archive, resuming an earlier attempt, and verify it."""
    url = BASE_URL + archive.url
    path = folder / Path(archive.url).name
    have = path.stat().st_size if path.exists() else 0
    if have < archive.size:
        print(f"Downloading {url} ({archive.size / 1e6:.0f} MB) to {path}", flush=True)
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                resumed = response.status == 206  # some servers ignore the range and send everything
                with open(path, "ab" if resumed else "wb") as file:
                    shutil.copyfileobj(response, file, CHUNK)
        except OSError as error:
            raise ConnectionError(
                f"{url} could not be downloaded ({getattr(error, 'reason', error)}). Run the same command again, "
                f"or download the file to {path} yourself."
            ) from error
    have = path.stat().st_size
    if have < archive.size:
        raise ConnectionError(
            f"{url} was cut off after {have} of {archive.size} bytes. Run the same command again to resume."
        )
    md5 = _md5(path)
    if md5 != archive.md5:
        path.unlink()
        raise SettingError(f"{url} has md5 {md5} instead of {archive.md5}; the file was removed. Try again.")
    return path


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
