"""The sources of a store's tensors: the protocol, one file per image, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from detr_lightning.format import names, reader
from detr_lightning.parallel import in_threads

_THREADS = 4


class Tensors(Protocol):
    """Reads an extraction's tensors. It can be pickled, and is cheap for data workers, since it keeps no metadata."""

    @property
    def bytes_on_disk(self) -> int:
        """The bytes of all tensors as stored."""

    def load(self, image_id: int) -> dict[str, Tensor]:
        """Return all tensors of an image."""

    def read(self, image_id: int, key: str) -> Tensor:
        """Return one tensor of an image, without reading the others where that is possible."""
        return self.load(image_id)[key]

    def each(self, image_ids: Sequence[int], key: str, use: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Call `use(index, tensor)` for each of many images, perhaps in threads, and yield after each."""
        for index, image_id in enumerate(image_ids):
            use(index, self.read(image_id, key))
            yield


class FileTensors:
    """The tensors of a folder with one `.pt` file per image.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = reader.TensorReader()

    @property
    def bytes_on_disk(self) -> int:
        """The bytes of all tensors as stored, by the files' sizes."""
        return sum(path.stat().st_size for path in self.folder.glob("embedding_*.pt"))

    def path(self, image_id: int) -> Path:
        """Return the path of an image's file."""
        return self.folder / names.file_name(image_id)

    def load(self, image_id: int) -> dict[str, Tensor]:
        """Return all tensors of an image.

        Raises:
            FileNotFoundError: Its file does not exist.
            InputError: Its file is damaged.
        """
        return reader.load(self.path(image_id))

    def read(self, image_id: int, key: str) -> Tensor:
        """Return one tensor of an image, without reading the others.

        Raises:
            FileNotFoundError: Its file does not exist.
            InputError: Its file is damaged, or lacks the key.
        """
        return self._reader.read(self.path(image_id), key)

    def each(self, image_ids: Sequence[int], key: str, use: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Call `use(index, tensor)` for each of many images, in threads, and yield after each."""

        def read_and_use(index: int) -> None:
            use(index, self.read(image_ids[index], key))

        yield from in_threads(read_and_use, range(len(image_ids)), _THREADS, "", progress=False)


class MemoryTensors(Tensors):
    """The tensors of images in memory.

    Args:
        images: Each image's tensors, by image id.
    """

    def __init__(self, images: Mapping[int, dict[str, Tensor]]) -> None:
        self._images = images

    @property
    def bytes_on_disk(self) -> int:
        """0, since the tensors are in memory."""
        return 0

    def load(self, image_id: int) -> dict[str, Tensor]:
        """Return all tensors of an image."""
        return dict(self._images[image_id])
