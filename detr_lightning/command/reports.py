"""The reports that the command prints: the plan of a run, its result, and the metrics of a validation."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from detr_lightning.data.images import turned_message
from detr_lightning.errors import SHOWN, count
from detr_lightning.extraction.writer import EmbeddingWriter
from detr_lightning.format.keys import dtype_of, nbytes, shape_of
from detr_lightning.format.names import METADATA
from detr_lightning.format.schema import Metadata
from detr_lightning.job import Job
from detr_lightning.progress import clock, speed
from detr_lightning.system import available_cores


def announcement(job: Job, free: int | None) -> list[RenderableType]:
    """Return the announcement of a planned run, and the content of each file.

    Args:
        job: A job with a writer, after `plan`.
        free: The free bytes on the disk; None if unknown.
    """
    writer, model, data = job.writer, job.model, job.data
    assert writer is not None
    run = writer.extraction
    assert run is not None, "call plan first"
    lines: list[RenderableType] = [f"{model.checkpoint.name}: {model.checkpoint.notes}"]
    finished = len(run.finished)
    if finished and not model.checkpoint.sha256:
        lines.append(
            f"Without the weights, the plan cannot check that {writer.output_dir} was extracted with them. "
            "A run checks this before it begins."
        )
    if run.complete:
        done = f"{writer.output_dir} is finished: {count(finished, 'image')}. Nothing to do."
        failures = [(record.file_name, reason) for record, reason in data.failures]
        return [*lines, done, *skipped(failures), next_command(writer)]
    others = f", {finished} more are finished" if finished else ""
    others += f", {len(data.failures)} more cannot be read" if data.failures else ""
    kept = model.hparams["extract_type"] if model.hparams["keys"] is None else count(len(model.keys), "key")
    lines.append(
        f"{count(len(run.pending), 'image')} to {writer.output_dir} ({kept}){others}: "
        f"{'about' if writer.min_score is None else 'at most'} {decimal(writer.bytes_needed(model))}"
        + ("" if free is None else f", {decimal(free)} free")
    )
    if writer.min_score is not None:
        lines.append(f"Only queries that score {writer.min_score} or more are kept: the sizes are upper bounds.")
    lines += [device(job.trainer), *cautions(job.trainer)]
    if not data.records:
        return lines
    record = data.records[0]
    title = f"Each image, such as {record.file_name} ({record.width}x{record.height})"
    table = Table("key", "shape", "dtype", "bytes", title=title, title_justify="left")
    table.columns[3].justify = "right"
    shape = model.detr.architecture.shape
    features = model.detr.architecture.feature_sizes(data.resize(record.size))
    for key in writer.keys(model):
        dtype = str(dtype_of(key, writer.dtype)).removeprefix("torch.")
        size = f"{nbytes([key], shape, features, writer.dtype):,}"
        table.add_row(key, str(list(shape_of(key, shape, features))), dtype, size)
    return [*lines, table]


def device(trainer: Trainer) -> str:
    """Return the device of a run, its precision, and the number of ranks and threads, as one line."""
    root = trainer.strategy.root_device
    name = f"{root} ({torch.cuda.get_device_name(root)})" if root.type == "cuda" else str(root)
    ranks = f", {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    threads = f", {count(threads_per_rank(trainer), 'thread')}{' each' if ranks else ''}" if root.type == "cpu" else ""
    return f"on {name} in {trainer.precision}{ranks}{threads}"


def threads_per_rank(trainer: Trainer) -> int:
    """Return the number of torch threads in each rank: Lightning divides the cores of a node among them."""
    ranks = trainer.num_devices
    if ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, available_cores() // ranks)


def cautions(trainer: Trainer) -> list[str]:
    """Return warnings about settings that make a run slow."""
    if trainer.strategy.root_device.type != "cpu":
        return []
    ranks, cores = trainer.num_devices, available_cores()
    if ranks > cores:
        return [f"Warning: {ranks} ranks share {count(cores, 'core')}: fewer devices are as fast and need less memory."]
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = ranks * threads_per_rank(trainer)
    if threads == 1 or threads + busy <= cores + 1:
        return []
    return [
        f"Note: other programs keep this machine busy (load {busy:.1f}, {count(cores, 'core')}). Threads that wait for "
        "each other can then take many times as long: OMP_NUM_THREADS=1 may be faster."
    ]


def result(writer: EmbeddingWriter, metadata: Metadata, seconds: float, ranks: int) -> list[RenderableType]:
    """Return the report of a finished run.

    Args:
        writer: The writer of rank 0.
        metadata: The metadata that the writer wrote.
        seconds: The duration of the run.
        ranks: The number of ranks.
    """
    failed, written = metadata.failed, writer.images_written
    table = Table(show_header=False)
    others = " by rank 0" if ranks > 1 else ""
    table.add_row("written", f"{count(written, 'image')}{others}, {decimal(writer.bytes_written)}")
    table.add_row("folder", f"{writer.output_dir}: {count(len(metadata.images), 'image')} and {METADATA}")
    rate = speed(written, seconds)
    table.add_row("time", f"{clock(seconds)}, {rate}" if rate else clock(seconds))
    turned = sum(entry.orientation is not None for entry in metadata.images)
    if turned and metadata.run.settings.preprocessing.get("exif") != "apply":
        table.add_row("stored turned", turned_message(turned, len(metadata.images)))
    if failed:
        table.add_row("skipped", f"{count(len(failed), 'image')}, listed under 'failed' in metadata.json")
    return [table, *skipped([(entry.file_name, entry.reason) for entry in failed]), next_command(writer)]


def next_command(writer: EmbeddingWriter) -> str:
    """Return a suggestion for the next command."""
    return f"Next: detr-lightning summary {shlex.quote(str(writer.output_dir))}"


def skipped(failures: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines that list the skipped images and the reasons.

    Args:
        failures: The file name and the reason of each image.
    """
    if not failures:
        return []
    more = [f"  and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
    lines = [f"  {name}: {reason}" for name, reason in failures[:SHOWN]]
    return [f"Warning: {count(len(failures), 'image')} could not be read:", *lines, *more]


def metrics(values: Mapping[str, float]) -> Table:
    """Return COCO's metrics as a table."""
    table = Table("COCO metric", "value")
    table.columns[1].justify = "right"
    for name, value in values.items():
        table.add_row(name, f"{value:.3f}")
    return table
