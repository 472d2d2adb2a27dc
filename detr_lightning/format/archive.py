"""The zip directory of a `.pt` file, which shows whether the file is whole, and laid out like another one.

A `.pt` file is an uncompressed zip archive with its directory at the end. Files with the same tensors have the same
directory except for its checksums, so it is parsed once for each kind of file, and only compared for all others.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.names import file_name

_ENTRY = b"PK\x01\x02"
_ENTRY_BYTES = 46


@dataclass(frozen=True, slots=True)
class Directory:
    """The zip directory of files of one size, without its checksums.

    Attributes:
        start: The offset at which it begins; it ends at the end of the file.
        content: Its bytes, with zeros in place of the checksums.
        checksums: The offsets of the checksums, relative to `start`.
    """

    start: int
    content: bytes
    checksums: tuple[int, ...]

    def is_of(self, descriptor: int) -> bool:
        """Return whether a file of the right size has this directory."""
        content = bytearray(os.pread(descriptor, len(self.content) + 1, self.start))
        for place in self.checksums:
            content[place : place + 4] = bytes(4)
        return content == self.content


def read_directory(file: BinaryIO) -> tuple[Directory, list[zipfile.ZipInfo]]:
    """Parse a file's zip directory.

    Raises:
        InputError: A part of the archive is compressed, or the parts are larger than the file. torch writes no such
            file, and unpacking one could fill the memory.
        Exception: There is no valid zip directory; zipfile raises nearly any type of error.
    """
    with zipfile.ZipFile(file) as archive:
        infos, start = archive.infolist(), archive.start_dir
    size = file.seek(0, os.SEEK_END)
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise InputError(f"its part {info.filename} is compressed")
    if sum(info.file_size for info in infos) > size:
        raise InputError("its parts are larger than the file")
    file.seek(start)
    content = bytearray(file.read())
    checksums, place = [], 0
    while content[place : place + 4] == _ENTRY:
        checksums.append(place + 16)
        content[place + 16 : place + 20] = bytes(4)
        lengths = (int.from_bytes(content[place + at : place + at + 2], "little") for at in (28, 30, 32))
        place += _ENTRY_BYTES + sum(lengths)
    return Directory(start, bytes(content), tuple(checksums)), infos


class WholeFiles:
    """Checks whether files are whole, and remembers the directories it has parsed."""

    def __init__(self) -> None:
        self._known: defaultdict[int, list[Directory]] = defaultdict(list)

    def among(self, folder: Path, entries: Iterable[tuple[int, ImageEntry]]) -> dict[int, ImageEntry]:
        """Return the entries, by image id, whose files in a folder are whole."""
        # A Path for each would cost as much as checking the file.
        return {id_: entry for id_, entry in entries if self.is_whole(f"{folder}/{file_name(id_)}", entry.bytes)}

    def is_whole(self, path: Path | str, size: int | None) -> bool:
        """Return whether a file has the recorded size and a valid zip directory. The tensors are not read.

        A link does not count as whole, wherever it leads.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor)
            if status.st_size != size or not stat.S_ISREG(status.st_mode):
                return False
            known = self._known[size]
            if not any(directory.is_of(descriptor) for directory in known):
                with open(descriptor, "rb", closefd=False) as file:
                    known.append(read_directory(file)[0])
        except Exception:  # A damaged directory makes zipfile raise nearly anything.
            return False
        finally:
            os.close(descriptor)
        return True
