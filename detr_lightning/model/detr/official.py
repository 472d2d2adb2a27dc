"""The published checkpoints of DETR, and their download."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detr_lightning.model.detr.detr import Architecture
from detr_lightning.model.labels import STUFF, coco_names
from detr_lightning.model.weight_files import first_line, sha256_of

BASE_URL = "https://dl.fbaipublicfiles.com/detr/"
STALLED_AFTER = 30.0
"""Seconds without data after which a download is aborted."""


@dataclass(frozen=True)
class Official:
    """A published checkpoint.

    Attributes:
        file: The name of the file under `BASE_URL`.
        sha256_prefix: The first eight digits of the file's sha256.
        dilation: Whether it is a DC5 model.
    """

    file: str
    sha256_prefix: str
    dilation: bool = False

    @property
    def known(self) -> dict[str, Any]:
        """The settings that the tensors do not show. All models have 8 heads."""
        return {"nheads": 8, "dilation": self.dilation}

    @property
    def architecture(self) -> Architecture:
        """The sizes of the network, known before the tensors are downloaded."""
        return Architecture(
            blocks=(3, 4, 23 if "r101" in self.file else 6, 3),
            num_logits=251 if "panoptic" in self.file else 92,
            **self.known,
        )

    @property
    def url(self) -> str:
        """The download address."""
        return BASE_URL + self.file

    @property
    def path(self) -> Path:
        """The path in torch's hub cache, once the file is downloaded."""
        return Path(torch.hub.get_dir(), "checkpoints", self.file)

    def cached_sha256(self) -> str | None:
        """Return the sha256 of the file in the cache; None if it is missing or damaged."""
        if not self.path.is_file():
            return None
        sha256 = sha256_of([self.path])
        return sha256 if sha256.startswith(self.sha256_prefix) else None

    @property
    def category_names(self) -> dict[int, str]:
        """The names of COCO's categories by id, which is the logit's index; panoptic models also have stuff."""
        return coco_names() | (STUFF if "panoptic" in self.file else {})


OFFICIAL = {
    "detr_resnet50": Official("detr-r50-e632da11.pth", "e632da11"),
    "detr_resnet50_dc5": Official("detr-r50-dc5-f0fb7ef5.pth", "f0fb7ef5", dilation=True),
    "detr_resnet101": Official("detr-r101-2c7b67e5.pth", "2c7b67e5"),
    "detr_resnet101_dc5": Official("detr-r101-dc5-a2e86def.pth", "a2e86def", dilation=True),
    "detr_resnet50_panoptic": Official("detr-r50-panoptic-00ce5173.pth", "00ce5173"),
    "detr_resnet50_dc5_panoptic": Official("detr-r50-dc5-panoptic-da08f1b1.pth", "da08f1b1", dilation=True),
    "detr_resnet101_panoptic": Official("detr-r101-panoptic-40021d53.pth", "40021d53"),
}
"""The published checkpoints (https://github.com/facebookresearch/detr, its model zoo)."""


def fetch(checkpoint: Official) -> tuple[Path, str]:
    """Return a checkpoint's file in torch's hub cache and its sha256; download the file if it is missing.

    Processes that share the cache wait for the one that downloads. A failed download leaves no file behind.

    Raises:
        ConnectionError: The file could not be downloaded, or its sha256 is wrong.
    """
    url, path, sha256_prefix = checkpoint.url, checkpoint.path, checkpoint.sha256_prefix
    cached = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent), _socket_timeout(STALLED_AFTER):
            if sha256 := checkpoint.cached_sha256():
                return path, sha256
            if path.is_file():
                cached = " The existing file is damaged."
            torch.hub.download_url_to_file(url, str(path), sha256_prefix, progress=sys.stderr.isatty())
            return path, sha256_of([path])
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url} could not be downloaded: {first_line(error)}. Check the network, or download the file to {path} "
            f"yourself (its sha256 begins with {sha256_prefix}).{cached}"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock; then a file may be downloaded twice
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
