"""The run for each layout: its planned images, the record of earlier runs, and the class that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning.pytorch import Trainer

from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.extraction.previous import PreviousRun, read_previous
from detr_lightning.extraction.provenance import provenance
from detr_lightning.extraction.run import ExtractionRun
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.schema import FILES

if TYPE_CHECKING:
    from detr_lightning.extraction.previous_table import PreviousTable

    Previous: TypeAlias = PreviousRun | PreviousTable


def planned_images(data: COCODataModule) -> tuple[list[ImageEntry], list[SkippedImage]]:
    """Return the entries of the planned images, and of those that cannot be read."""
    images = [
        ImageEntry(
            record.image_id,
            record.file_name,
            record.width,
            record.height,
            input_size=data.resize(record.size),
            orientation=record.orientation if record.orientation > 1 else None,
        )
        for record in data.records
    ]
    return images, [SkippedImage(record.image_id, record.file_name, reason) for record, reason in data.failures]


def previous_runs(layout: str, output_dir: Path | str) -> Previous:
    """Return the record of earlier runs in an output folder or at a URL.

    Raises:
        InputError: It has another layout, belongs to another program, or is damaged.
        MissingPackageError: Lance is needed but not installed.
        OSError: It cannot be read.
    """
    if layout == FILES:
        return read_previous(Path(output_dir))
    from detr_lightning.extraction.previous_table import PreviousTable  # needs Lance

    return PreviousTable.read(str(output_dir))


def planned_run(
    trainer: Trainer,
    model: DETRExtractor,
    data: COCODataModule,
    writer: Mapping[str, Any],
    previous: Previous | None = None,
    commit_seconds: float = 30.0,
) -> PlannedRun:
    """Return the run that carries out a job.

    Args:
        trainer: The Trainer that runs the model.
        model: The model.
        data: The images, already found by `find_images`.
        writer: The writer's settings as they are recorded.
        previous: The record of earlier runs, if it has been read.
        commit_seconds: See `TableRun`.
    """
    record = provenance(trainer, model, data, writer)
    images, failures = planned_images(data)
    output_dir, if_exists = writer["output_dir"], writer["if_exists"]
    if writer["layout"] == FILES:
        assert previous is None or isinstance(previous, PreviousRun)
        return ExtractionRun(Path(output_dir), record, images, failures, if_exists, data.hash_files, previous)
    from detr_lightning.extraction.previous_table import PreviousTable  # needs Lance, like TableRun
    from detr_lightning.extraction.table_run import TableRun

    assert previous is None or isinstance(previous, PreviousTable)
    size = images[0].input_size if images else (32, 32)
    return TableRun(
        output_dir,
        record,
        images,
        failures,
        if_exists,
        data.hash_files,
        previous,
        features=model.detr.architecture.feature_sizes(size),
        commit_seconds=commit_seconds,
    )
