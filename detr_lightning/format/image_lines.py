"""The images' entries in a `metadata.json`, one per line, each parsed when it is needed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from detr_lightning.errors import InputError


class ImageLines:
    """The images' entries in a file that this program wrote, one per line.

    Attributes:
        begin: The offset at which the entries begin.
        end: The offset at which they end.
        count: The number of entries.
    """

    _BEFORE = b'\n  "images": ['
    _AFTER = b"\n  ],"

    def __init__(self, data: bytes, begin: int, end: int) -> None:
        self._data, self.begin, self.end = data, begin, end
        self.count = data.count(b"\n", begin, end)

    @classmethod
    def of(cls, data: bytes) -> ImageLines | None:
        """Return the lines of a file, or None if it is formatted otherwise. JSON strings contain no line breaks."""
        begin = data.find(cls._BEFORE)
        end = data.find(cls._AFTER, begin)
        if not data.startswith(b'{\n  "image_ids": [') or begin < 0 or end < 0:
            return None
        return cls(data, begin + len(cls._BEFORE), end)

    @cached_property
    def _starts(self) -> np.ndarray:
        block = np.frombuffer(self._data, np.uint8, self.end - self.begin, self.begin)
        return np.append(np.flatnonzero(block == ord("\n")) + self.begin, self.end)

    def __getitem__(self, position: int) -> Any:
        line = self._data[self._starts[position] : self._starts[position + 1]].strip().removesuffix(b",")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {position} of its images is not JSON ({error})") from error

    def __iter__(self) -> Iterator[Any]:
        begin = self.begin + 1
        while begin < self.end:
            end = self._data.find(b"\n", begin, self.end)
            end = self.end if end < 0 else end
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(self._data[begin:end].strip().removesuffix(b",").decode())
            begin = end + 1
