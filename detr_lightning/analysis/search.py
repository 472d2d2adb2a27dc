"""Nearest-neighbour search in a table of objects: exact, or for large tables with an index saved beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detr_lightning.analysis.tables import fingerprint
from detr_lightning.analysis.vectors import unit
from detr_lightning.errors import InputError, MissingPackageError, SettingError
from detr_lightning.format.files import replacing

# Below tables, which reports a missing pyarrow.
import pyarrow as pa  # isort: skip
from pyarrow import parquet  # isort: skip

if TYPE_CHECKING:
    import pandas as pd

EXACT_ROWS = 100_000
"""Tables with fewer rows are searched exactly by default."""

TRAINING_ROWS = 39
"""Training vectors per cell of an index: the fewest for which FAISS does not warn."""

PROBED_SHARE = 32
"""A search visits one in this many cells."""


COMPARED_AT_ONCE = 2**26
"""Cosines that an exact search keeps in memory at a time: 270 MB."""


class ObjectSearch:
    """Searches the objects of a Parquet file by cosine similarity.

    Args:
        path: A table written by `write_objects` or `write`.
        exact: Compare with every vector; by default for fewer than 100,000 rows. Otherwise FAISS finds the nearest
            through cells of similar vectors, and may miss a few. The index is saved beside the table, in a file that
            ends in `.index.npz`, when it is first needed.

    Raises:
        FileNotFoundError: There is no such table.
        InputError: It is not a table with embeddings for all objects, or the index beside it is damaged.
        MissingPackageError: An index is needed and FAISS is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], exact: bool | None = None) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist. `detr-lightning objects` writes a table.")
        try:
            self._file = parquet.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.path} is not a Parquet file ({error}).") from error
        if "embedding" not in self._file.schema_arrow.names:
            raise InputError(f"{self.path} has no column embedding. Write the table with embeddings first.")
        self._rest: pa.Table | None = None
        self.exact = len(self) < EXACT_ROWS if exact is None else exact
        self._vectors = torch.from_numpy(self._all_vectors()) if self.exact else None
        self._index = None if self.exact else self._open_index()

    def __len__(self) -> int:
        """Return the number of objects."""
        return int(self._file.metadata.num_rows)

    def search(self, vectors: np.ndarray, k: int = 10) -> pd.DataFrame:
        """Return the `k` nearest objects of each query.

        Args:
            vectors: `[N, d]`, embeddings of the same model, key and layer as the table's.
            k: How many neighbours, at most.

        Returns:
            The rows of the table, without embeddings, with `search` (the number of the query), `rank` (from 1) and
            `similarity` (the cosine). Sorted by query, then by rank.

        Raises:
            SettingError: `k` is below 1, or the vectors and the table's differ in length.
        """
        if k < 1:
            raise SettingError(f"k is {k}, but must be at least 1.")
        queries = unit(np.atleast_2d(np.asarray(vectors, np.float32)))
        width = self._width()
        if len(self) and queries.shape[1] != width:
            raise SettingError(
                f"the query has {queries.shape[1]} dimensions, but the vectors of {self.path} have {width}."
            )
        similarity, rows = self._nearest(queries, min(k, len(self)))
        valid = rows >= 0  # FAISS returns -1 if the cells that it searched contain too few vectors.
        if self._rest is None:
            self._rest = self._file.read([name for name in self._file.schema_arrow.names if name != "embedding"])
        found: pd.DataFrame = self._rest.take(rows[valid]).to_pandas()
        number, rank = np.nonzero(valid)
        found.insert(0, "search", number)
        found.insert(1, "rank", rank + 1)
        found.insert(2, "similarity", similarity[valid].astype(float))
        return found

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and the rows of the nearest vectors, each `[N, k]`."""
        if not k:
            return np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
        if self._vectors is not None:
            some = max(COMPARED_AT_ONCE // len(self), 1)
            parts = [(part @ self._vectors.T).topk(k) for part in torch.from_numpy(queries).split(some)]
            return torch.cat([part.values for part in parts]).numpy(), torch.cat(
                [part.indices for part in parts]
            ).numpy()
        assert self._index is not None
        values, rows = self._index.search(queries, k)
        return np.asarray(values), np.asarray(rows)

    def _width(self) -> int:
        """Return the length of the vectors; 0 if the file does not record one, as `write` for an empty table."""
        column = self._file.schema_arrow.field("embedding").type
        return int(column.list_size) if pa.types.is_fixed_size_list(column) else 0

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield the vectors of each row group, scaled to length 1."""
        width = self._width()
        for number in range(self._file.num_row_groups if len(self) else 0):
            column = self._file.read_row_group(number, ["embedding"])["embedding"].combine_chunks()
            if column.null_count:
                raise InputError(
                    f"{self.path} has objects without an embedding, since they were missed. Leave them out."
                )
            if not width:
                raise InputError(
                    f"{self.path} has embeddings of type {column.type}, not vectors of one length. "
                    "Write the table with `write` of detr_lightning.analysis.objects."
                )
            yield unit(column.flatten().to_numpy().reshape(-1, width).astype(np.float32, copy=False))

    def _all_vectors(self) -> np.ndarray:
        return np.concatenate([np.empty((0, self._width()), np.float32), *self._blocks()])

    def _open_index(self) -> Any:
        try:
            import faiss
        except ImportError as error:
            raise MissingPackageError(
                f"Searching {len(self):,} objects through an index needs FAISS: pip install 'detr-lightning[search]'. "
                "Without it, search exactly (--exact, or exact=True)."
            ) from error
        path = self.path.with_suffix(".index.npz")
        table = fingerprint(self.path)
        if path.exists():
            try:
                with open(path, "rb") as file, np.load(file) as saved:
                    if str(saved["table"]) == table:
                        return faiss.deserialize_index(saved["index"])
            except Exception as error:  # A damaged archive makes numpy and FAISS raise nearly anything.
                raise InputError(f"{path} is damaged ({error}). Remove it: it will be rebuilt.") from error
        index = self._build_index(faiss)
        with replacing(path) as new:
            np.savez(new, table=np.array(table), index=faiss.serialize_index(index))
        return index

    def _build_index(self, faiss: Any) -> Any:
        cells = max(min(int(4 * np.sqrt(len(self))), len(self) // TRAINING_ROWS), 1)
        width = self._width()
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        index.cp.spherical = True
        share = min(TRAINING_ROWS * cells / max(len(self), 1), 1)
        random = np.random.default_rng(0)
        index.train(np.concatenate([block[random.random(len(block)) <= share] for block in self._blocks()]))
        for block in self._blocks():
            index.add(block)
        index.nprobe = max(cells // PROBED_SHARE, 1)
        return index
