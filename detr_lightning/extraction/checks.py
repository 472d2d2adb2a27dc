"""Checks that all layouts share: the same settings and images as in earlier runs, and no image missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from detr_lightning.errors import KEPT, SHOWN, IncompleteError, InputError, count
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.identity import RunSettings

Place = Path | str

HashFiles = Callable[[Collection[int]], Mapping[int, str]]
"""Returns the sha256 of each image's file, by image id."""


def refuse_used(output_dir: Place) -> NoReturn:
    """Refuse an output folder that is not empty, when `if_exists` is `error`.

    Raises:
        FileExistsError: Always.
    """
    raise FileExistsError(
        f"output_dir {output_dir} is not empty, and writer.if_exists is 'error'. Choose another output_dir, "
        "or writer.if_exists=resume to continue or overwrite to start again."
    )


def refuse_other_settings(
    output_dir: Place, finished: Collection[int], earlier: Callable[[], RunSettings], settings: RunSettings
) -> None:
    """Check that the finished images were extracted with the settings of this run.

    Args:
        output_dir: The output folder or URL.
        finished: The ids of the finished images.
        earlier: Returns the settings they were extracted with.
        settings: This run's settings.

    Raises:
        InputError: The settings differ, or the earlier ones are not recorded; the message names each with both values.
    """
    try:
        differences = settings.differences(earlier())
    except InputError as error:
        raise InputError(
            f"output_dir {output_dir} does not record the settings its images were extracted with ({error}). "
            "Choose another output_dir, or writer.if_exists=overwrite."
        ) from error
    if differences:
        raise InputError(
            f"output_dir {output_dir} contains {len(finished)} images extracted with other settings: "
            f"{'; '.join(differences)}. Use the same settings, another output_dir, or writer.if_exists=overwrite."
        )


def refuse_other_images(
    output_dir: Place, finished: Mapping[int, ImageEntry], planned: Mapping[int, ImageEntry], turned: bool
) -> None:
    """Check that no finished image differs from the planned image with the same id.

    Args:
        output_dir: The output folder or URL.
        finished: The finished images.
        planned: The planned images.
        turned: Whether images are turned by their EXIF orientation.

    Raises:
        InputError: One differs in file name, size or, if it is turned, orientation; the message names both values.
    """
    names = ("file_name", "width", "height", *(("orientation",) if turned else ()))
    for image_id, entry in planned.items():
        before = finished.get(image_id)
        for name in names:
            if before is not None and getattr(before, name) != getattr(entry, name):
                raise InputError(
                    f"image {image_id} in output_dir {output_dir} was extracted with {name} {getattr(before, name)}, "
                    f"but now has {getattr(entry, name)}. Choose another output_dir, or writer.if_exists=overwrite."
                )


def refuse_changed_files(
    output_dir: Place, finished: Mapping[int, ImageEntry], planned: Collection[int], hash_files: HashFiles
) -> dict[int, ImageEntry]:
    """Check that the files of finished images have not changed since they were extracted.

    Returns:
        The entries that had no sha256 yet, with the current one filled in.

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
            f"output_dir {output_dir} contains {count(len(changed), 'image')} whose file has changed since (different "
            f"sha256): {some}. Restore the earlier files, choose another output_dir, or use writer.if_exists=overwrite."
        )
    return added


def refuse_missing(output_dir: Place, missing: Sequence[int], planned: int, lack: str = "whole file") -> None:
    """Check that no planned image is missing.

    Args:
        output_dir: The output folder or URL.
        missing: The ids of the planned images that are missing.
        planned: The number of planned images.
        lack: What they lack, in the words of the message.

    Raises:
        IncompleteError: At least one is missing; the message names a few.
    """
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise IncompleteError(f"{len(missing)} of {planned} images have no {lack} in {output_dir}: {some}. {KEPT}")
