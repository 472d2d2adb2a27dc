"""Reading the images that an unfinished run in a folder has finished so far."""

from __future__ import annotations

import contextlib
from pathlib import Path

from detr_lightning.format.archive import WholeFiles
from detr_lightning.format.files import to_json_bytes
from detr_lightning.format.metadata import MetadataFile, read_metadata
from detr_lightning.format.names import RUN, STATE
from detr_lightning.format.schema import Metadata, RunRecord
from detr_lightning.format.state import RunState, read_entries, read_run, token_of


def read_partial(folder: Path) -> MetadataFile:
    """Return the metadata of an extraction that may be unfinished.

    Raises:
        FileNotFoundError: There is no such folder or no extraction in it, or a run is emptying it.
        InputError: Its `metadata.json` or `run.json` is damaged or another program's.
    """
    while folder.is_dir() and (run := read_run(folder)) is not None:
        if run.void:
            raise FileNotFoundError(
                f"{folder} is being emptied by a run with writer.if_exists=overwrite. Run that command again to finish."
            )
        with contextlib.suppress(FileNotFoundError):  # The run has just ended, or another has begun.
            metadata = _so_far(folder, run)
            if token_of(folder) == run.token:
                return metadata
    return read_metadata(folder)


def _so_far(folder: Path, run: RunState) -> MetadataFile:
    entries, failed = read_entries(folder)
    whole = WholeFiles().among(folder, sorted(entries.items()))
    metadata = Metadata(
        run=RunRecord.from_json(run.content),
        images=list(whole.values()),
        failed=[failed[image_id] for image_id in sorted(failed)],
    )
    found = MetadataFile(folder / STATE / RUN, to_json_bytes(metadata.to_json()))
    found.partial, found.num_planned = True, run.num_planned
    return found
