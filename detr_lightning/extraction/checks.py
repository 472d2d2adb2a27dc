"""Refusals that all layouts share: an output folder with other settings or images, a run with images missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from detr_lightning.errors import SHOWN, IncompleteError, InputError, count
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.identity import RunSettings

Place = Path | str

HashFiles = Callable[[Collection[int]], Mapping[int, str]]
"""Returns the sha256 of images' files by id."""


def refuse_used(output_dir: Place) -> NoReturn:
    """Refuse an output folder that is not empty, where `if_exists` is `error`.

    Raises:
        FileExistsError: Always.
    """
    raise FileExistsError(
        f"output_dir {output_dir} is not empty, and writer.if_exists is 'error'. Choose another output_dir, "
        "or writer.if_exists=resume to go on or overwrite to start again."
    )


def refuse_other_settings(
    output_dir: Place, finished: Collection[int], earlier: Callable[[], RunSettings], settings: RunSettings
) -> None:
    """Check that the finished images were extracted with the settings of this run.

    Args:
        output_dir: The output folder or URL.
        finished: The ids of the finished images.
        earlier: Returns the settings that they were extracted with.
        settings: Those of this run.

    Raises:
        InputError: They differ, or are not recorded; the message names each setting with both values.
    """
    try:
        differences = settings.differences(earlier())
    except InputError as error:
        raise InputError(
            f"output_dir {output_dir} does not record with which settings its images were extracted ({error}). "
            "Choose another output_dir, or writer.if_exists=overwrite."
        ) from error
    if differences:
        raise InputError(
            f"output_dir {output_dir} holds {len(finished)} images extracted with other settings: "
            f"{'; '.join(differences)}. Use the same settings, another output_dir, or writer.if_exists=overwrite."
        )


def refuse_other_images(
    output_dir: Place, finished: Mapping[int, ImageEntry], planned: Mapping[int, ImageEntry]
) -> None:
    """Check that no finished image has the id of another planned one.

    Raises:
        InputError: One has; the message names what differs.
    """
    for image_id, entry in planned.items():
        before = finished.get(image_id)
        for name in ("file_name", "width", "height"):
            if before is not None and getattr(before, name) != getattr(entry, name):
                raise InputError(
                    f"output_dir {output_dir} has image {image_id} with {name} {getattr(before, name)}, now "
                    f"it is {getattr(entry, name)}. Choose another output_dir, or writer.if_exists=overwrite."
                )


def refuse_changed_files(
    output_dir: Place, finished: Mapping[int, ImageEntry], planned: Collection[int], hash_files: HashFiles
) -> dict[int, ImageEntry]:
    """Check that the files of finished images are those that were extracted.

    Returns:
        The entries of those whose file was not hashed then, with its sha256 of now.

    Raises:
        InputError: Files have changed; the message names them.
    """
    hashes = hash_files({image_id for image_id in planned if image_id in finished})
    added = {i: replace(finished[i], image_sha256=found) for i, found in hashes.items() if not finished[i].image_sha256}
    changed = [
        repr(finished[i].file_name)
        for i, found in hashes.items()
        if i not in added and finished[i].image_sha256 != found
    ]
    if changed:
        some = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise InputError(
            f"output_dir {output_dir} holds {count(len(changed), 'image')} whose file has changed since (another "
            f"sha256): {some}. Put the earlier files back, choose another output_dir, or writer.if_exists=overwrite."
        )
    return added


def refuse_missing(output_dir: Place, missing: Sequence[int], planned: int, lack: str = "whole file") -> None:
    """Check that no planned image is missing.

    Args:
        output_dir: The output folder or URL.
        missing: The ids of the planned images that are missing.
        planned: The number of planned images.
        lack: The thing that they lack.

    Raises:
        IncompleteError: One is; the message names a few.
    """
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise IncompleteError(
            f"{len(missing)} of {planned} images have no {lack} in {output_dir}: {some}. "
            "What is finished is kept: run the same command again to go on."
        )
