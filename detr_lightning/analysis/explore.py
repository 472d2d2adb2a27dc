"""Embedding Atlas for the objects of a store: a table with thumbnails, a map and neighbours, in the browser."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detr_lightning.analysis.pictures import open_picture, square_around
from detr_lightning.errors import InputError, MissingPackageError, SettingError
from detr_lightning.format.files import replacing
from detr_lightning.parallel import in_threads
from detr_lightning.store.store import EmbeddingStore

NEEDED = "Exploring needs Embedding Atlas: pip install 'detr-lightning[explore]' (Python 3.11 or newer)."

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as missing:
    raise MissingPackageError(NEEDED) from missing

SIDE = 96
"""The side of a thumbnail in pixels."""

NEIGHBOURS = 15
FEWEST = 4
"""The fewest objects that can be put on a map."""

_LEFT_OUT = ("embedding", "bbox")
_FIRST = ("category", "score", "outcome", "annotated_category", "iou", "area_class", "file_name")
"""The columns shown first, next to the thumbnails, so that they are visible without scrolling."""

_MADE_FROM = b"detr_lightning_explore"
_THREADS = 2


def require_atlas() -> None:
    """Check that Embedding Atlas is installed.

    Raises:
        MissingPackageError: It is not.
    """
    if importlib.util.find_spec("embedding_atlas") is None:
        raise MissingPackageError(NEEDED)


def prepare(
    store: EmbeddingStore,
    table: Path,
    output: Path,
    image_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> bool:
    """Write the table that Embedding Atlas shows, unless it exists and is up to date.

    Args:
        store: The extraction.
        table: Its table of objects, with embeddings.
        output: The file to write: the columns of the table without the embeddings, plus `projection_x`, `projection_y`
            (UMAP), `neighbors`, and, if the images are found, `crop`.
        image_dir: Where the images are now; by default where they were when they were extracted.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        Whether the images were found, so that the table has thumbnails.

    Raises:
        FileNotFoundError: Only some images exist, or `image_dir` has none of them.
        InputError: The table has no objects, or an image has another size than at the extraction.
        MissingPackageError: Embedding Atlas is not installed.
    """
    from detr_lightning.analysis.tables import fingerprint  # Not at the top: it would name another extra.

    objects = parquet.read_table(table)
    if not len(objects):
        raise InputError(f"{table} has no objects to explore. Lower the threshold.")
    pictures = _has_image(store, objects["image_id"][0].as_py(), image_dir)
    made_from = json.dumps([fingerprint(table), pictures, str(image_dir), _FIRST, SIDE]).encode()
    if output.exists() and (parquet.read_schema(output).metadata or {}).get(_MADE_FROM) == made_from:
        return pictures
    first = [name for name in _FIRST if name in objects.column_names]
    shown = objects.select([*first, *(name for name in objects.column_names if name not in (*first, *_LEFT_OUT))])
    for name, column in _project(objects["embedding"]).items():
        shown = shown.append_column(name, column)
    schema = shown.schema.with_metadata({_MADE_FROM: made_from})
    if pictures:
        schema = schema.insert(0, pa.field("crop", pa.struct({"bytes": pa.binary()})))
    with replacing(output) as file, parquet.ParquetWriter(file, schema) as writer:
        for part in _by_image(shown) if not pictures else _with_crops(store, shown, image_dir, progress):
            writer.write_table(part.cast(schema))
    return pictures


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Check that a page may be written into a folder.

    Raises:
        FileExistsError: It is not empty, and `overwrite` is False.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"{folder} is not empty. Choose another folder, or give --overwrite.")


def check_port(port: int) -> None:
    """Check that a port of this machine is free.

    Raises:
        SettingError: It is in use, or is not a valid port.
    """
    with socket.socket() as probe:
        if not 0 < port < 2**16 or probe.connect_ex(("localhost", port)) == 0:
            raise SettingError(f"port {port} is in use, or not a valid port. Choose another with --port.")


def export(prepared: Path, pictures: bool, folder: Path) -> None:
    """Write a static page, `index.html` and its data, which any web server can serve.

    Args:
        prepared: The table that `prepare` wrote.
        pictures: Whether it has thumbnails.
        folder: Where the page goes.

    Raises:
        MissingPackageError: Embedding Atlas is not installed.
        OSError: Embedding Atlas failed; the message has its output.
    """
    command = _command(prepared, pictures, "--export-application", str(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / "index.html").is_file():
        raise OSError(f"Embedding Atlas did not write {folder}:\n{(done.stderr or done.stdout).strip()[-2000:]}")


def serve(prepared: Path, pictures: bool, port: int) -> int:
    """Serve the page on this machine until Ctrl-C, and return the exit code of the server.

    Raises:
        MissingPackageError: Embedding Atlas is not installed.
    """
    arguments = ("--host", "localhost", "--port", str(port), "--no-auto-port")
    try:
        return subprocess.run(_command(prepared, pictures, *arguments), check=False).returncode
    except KeyboardInterrupt:
        return 0


def _command(prepared: Path, pictures: bool, *arguments: str) -> list[str]:
    require_atlas()
    columns = ["--x", "projection_x", "--y", "projection_y", "--neighbors", "neighbors"]
    if pictures:
        columns += ["--image", "crop"]
    return [sys.executable, "-m", "embedding_atlas.cli", str(prepared), *columns, *arguments]


def _project(column: pa.ChunkedArray) -> dict[str, pa.Array]:
    """Return the position of each object on a map, and its nearest neighbours."""
    flat = column.combine_chunks()
    vectors = flat.flatten().to_numpy().reshape(len(flat), -1)
    if len(vectors) < FEWEST:
        nothing: list[list[float]] = [[]] * len(vectors)
        places, ids, distances = np.zeros((len(vectors), 2)), nothing, nothing
    else:
        require_atlas()
        import pandas as pd
        from embedding_atlas.projection import compute_projection

        near = min(NEIGHBOURS, len(vectors) - 1)
        settings = {"metric": "cosine", "n_neighbors": near, "init": "spectral" if len(vectors) > 50 else "random"}
        frame = pd.DataFrame({"vector": list(vectors)})
        frame = compute_projection(frame, inputs="vector", modality="vector", umap_args=settings)
        places = frame[["projection_x", "projection_y"]].to_numpy(float)
        ids = [[int(number) for number in row["ids"]] for row in frame["neighbors"]]
        distances = [[float(number) for number in row["distances"]] for row in frame["neighbors"]]
    neighbours = pa.StructArray.from_arrays(
        [pa.array(ids, pa.list_(pa.int64())), pa.array(distances, pa.list_(pa.float64()))], ["ids", "distances"]
    )
    return {"projection_x": pa.array(places[:, 0]), "projection_y": pa.array(places[:, 1]), "neighbors": neighbours}


def _has_image(store: EmbeddingStore, image_id: int, image_dir: str | os.PathLike[str] | None) -> bool:
    try:
        store.image_path(image_id, image_dir)
    except FileNotFoundError:
        if image_dir is not None:
            raise
        return False
    return True


def _by_image(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows of each image, which are adjacent."""
    ids = table["image_id"].to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    for low, high in itertools.pairwise(bounds):
        yield table.slice(low, high - low)


def _with_crops(
    store: EmbeddingStore, table: pa.Table, image_dir: str | os.PathLike[str] | None, progress: bool | None
) -> Iterator[pa.Table]:
    """Yield a few thousand rows at a time with their thumbnails."""

    def crops(part: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = part.select(["x1", "y1", "x2", "y2"]).to_pylist()
        with open_picture(store, part["image_id"][0].as_py(), image_dir) as picture:
            images = [{"bytes": _jpeg(square_around(picture, *row.values()))} for row in rows]
        return part.add_column(0, "crop", pa.array(images, pa.struct({"bytes": pa.binary()})))

    waiting: list[pa.Table] = []
    for part in in_threads(crops, list(_by_image(table)), _THREADS, "Cutting out objects", progress):
        waiting.append(part)
        if sum(map(len, waiting)) >= 4096:
            yield pa.concat_tables(waiting)
            waiting.clear()
    if waiting:
        yield pa.concat_tables(waiting)


def _jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(data, "JPEG", quality=85)
    return data.getvalue()
