"""What the command says of a run: what it will do, what it did, what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.errors import SHOWN, count
from detr_lightning.extraction.writer import EmbeddingWriter
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.keys import dtype_of, nbytes, shape_of
from detr_lightning.format.names import METADATA
from detr_lightning.format.schema import Metadata
from detr_lightning.system import available_cores


def announcement(
    writer: EmbeddingWriter, model: DETRExtractor, data: COCODataModule, free: int | None
) -> list[RenderableType]:
    """Return what a planned run will do, and what each of its files will hold.

    Args:
        writer: After `plan`.
        model: The model.
        data: The images.
        free: The bytes that the disk has free; None where nobody knows.
    """
    run = writer.extraction
    assert run is not None, "plan comes first"
    lines = [f"{model.checkpoint.name}: {model.checkpoint.notes}"]
    finished = len(run.finished)
    if run.complete:
        return [*lines, f"{writer.output_dir} is finished: {count(finished, 'image')}, all there. Nothing to do."]
    there = f", {finished} more are there already" if finished else ""
    lines.append(
        f"{count(len(run.pending), 'image')} to {writer.output_dir} ({model.hparams['extract_type']}){there}: "
        f"{'about' if writer.min_score is None else 'at most'} {decimal(writer.bytes_needed(model))}"
        + ("" if free is None else f", {decimal(free)} free")
    )
    if writer.min_score is not None:
        lines.append(f"Only queries that score {writer.min_score} or more are kept: the sizes are upper bounds.")
    if not data.records:
        return [*lines]
    record = data.records[0]
    table = Table(
        "key",
        "shape",
        "dtype",
        "bytes",
        title=f"Each image, such as {record.file_name} ({record.width}x{record.height})",
        title_justify="left",
    )
    table.columns[3].justify = "right"
    shape = model.detr.architecture.shape
    features = model.detr.architecture.feature_sizes(data.resize(record.size))
    for key in writer.keys(model):
        dtype = str(dtype_of(key, writer.dtype)).removeprefix("torch.")
        size = f"{nbytes([key], shape, features, writer.dtype):,}"
        table.add_row(key, str(list(shape_of(key, shape, features))), dtype, size)
    return [*lines, table]


def cautions(trainer: Trainer) -> list[str]:
    """Return warnings of what would make a run slow."""
    ranks, cores = trainer.num_devices, available_cores()
    if trainer.strategy.root_device.type != "cpu" or ranks <= cores:
        return []
    return [f"Warning: {ranks} ranks share {count(cores, 'core')}: fewer devices are as fast and need less memory."]


def result(writer: EmbeddingWriter, metadata: Metadata, seconds: float, ranks: int) -> list[RenderableType]:
    """Return what a run did.

    Args:
        writer: Of rank 0.
        metadata: What the writer wrote at the end.
        seconds: How long it took.
        ranks: How many ranks there were.
    """
    failed, written = metadata.failed, writer.images_written
    table = Table(show_header=False)
    others = " by rank 0" if ranks > 1 else ""
    table.add_row("written", f"{count(written, 'image')}{others}, {decimal(writer.bytes_written)}")
    table.add_row("folder", f"{writer.output_dir}: {count(len(metadata.images), 'image')} and {METADATA}")
    speed = f", {written / seconds:.2f} images/s" if seconds > 0 else ""  # A clock may stand still.
    table.add_row("time", f"{seconds:.1f} s{speed}")
    if not failed:
        return [table]
    table.add_row("skipped", f"{count(len(failed), 'image')}, listed under 'failed' in metadata.json")
    return [table, *skipped([(entry.file_name, entry.reason) for entry in failed])]


def skipped(failures: Sequence[tuple[str, str]]) -> list[str]:
    """Return which images were left out, and why.

    Args:
        failures: The file name of each, and the reason.
    """
    if not failures:
        return []
    more = [f"  and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
    lines = [f"  {name}: {reason}" for name, reason in failures[:SHOWN]]
    return [f"Warning: {count(len(failures), 'image')} could not be read:", *lines, *more]


def metrics(values: Mapping[str, float]) -> Table:
    """Return COCO's numbers as a table."""
    table = Table("COCO metric", "value")
    table.columns[1].justify = "right"
    for name, value in values.items():
        table.add_row(name, f"{value:.3f}")
    return table
