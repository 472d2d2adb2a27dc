"""The images of a run as a LightningDataModule."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from detr_lightning.data.batching import BATCHINGS, plan_batches
from detr_lightning.data.coco import read_coco_file
from detr_lightning.data.decode import BACKENDS, image_folder
from detr_lightning.data.loading import (
    PREFETCHED_BATCHES,
    SHARED_MEMORY,
    ImageBatches,
    Reader,
    free_shared_memory,
    leave_signals_to_parent,
    read_file,
    unwrap,
)
from detr_lightning.data.records import Failure, ImageRecord
from detr_lightning.data.sources import read_coco, read_folder, select
from detr_lightning.errors import SettingError, UnreadableImageError, check_choice
from detr_lightning.format.preprocessing import resized_size
from detr_lightning.ranks import from_rank_0
from detr_lightning.system import available_cores


def require_all_batches(trainer: Trainer, stage: Literal["predict", "val"]) -> None:
    """Refuse a Trainer that would leave images out.

    Raises:
        SettingError: It is to stop after a part of the batches.
    """
    limit = getattr(trainer, f"limit_{stage}_batches")
    if isinstance(limit, int) or limit != 1.0:
        raise SettingError(
            f"trainer.limit_{stage}_batches (or trainer.fast_dev_run, trainer.overfit_batches) ends the run early "
            f"({limit}). A result counts when every image is there: choose images with data.limit or data.image_ids."
        )


class COCODataModule(LightningDataModule):
    """COCO images, or any folder of images, in batches.

    Args:
        image_dir: The folder with the images.
        annotation_file: COCO's `instances_*.json` for them. Without it every image in the folder and its subfolders is
            taken (`.jpg`, `.jpeg`, `.png`, `.bmp`, `.webp`, `.tif`, `.tiff`), and sizes come from the headers.
        image_ids: Only these images.
        limit: Only the first so many images, by id.
        batch_size: The most images in a batch. It changes speed and memory, and with `exact` batching no result. By
            default 4 on a CPU, which reads that many at a time and computes them one by one, and 8 elsewhere.
        num_workers: Processes that read images. By default none on a CPU, where they would take the model's cores from
            it, and elsewhere one for each core besides the first of each device, at least 1 and at most 8.
        batching: `exact` puts only images of one resized size in a batch, so nothing is padded and no image changes
            another's embeddings. `padded` fills up smaller images as the official code does, in the order of the ids.
        image_backend: `pil` gives the official pixels bit for bit; `torchvision` is faster, within 1 level of 255.
        on_error: What to do about an image that cannot be read: `raise`, or `skip` it and list it in the metadata.
        short_side: What the short side of an image is resized to. The official models want 800.
        long_side: What the long side should not pass. The official models want 1333.
        max_image_pixels: Refuse larger images as decompression bombs; by default above Pillow's limit, 89 million.
        download: Fetch COCO val2017 (1 GB) to `image_dir` and `annotation_file` where they are missing.

    Raises:
        ValueError: A setting that is not allowed; the message says what is.
    """

    def __init__(
        self,
        image_dir: str,
        annotation_file: str | None = None,
        image_ids: list[int] | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        batching: str = "exact",
        image_backend: str = "pil",
        on_error: str = "raise",
        short_side: int = 800,
        long_side: int = 1333,
        max_image_pixels: int | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        check_choice("data.batching", batching, BATCHINGS)
        check_choice("data.image_backend", image_backend, BACKENDS)
        check_choice("data.on_error", on_error, ("raise", "skip"))
        lowest = {"batch_size": 1, "num_workers": 0, "limit": 1, "short_side": 1, "long_side": 1, "max_image_pixels": 1}
        for name, least in lowest.items():
            value = locals()[name]
            if value is not None and value < least:
                raise SettingError(f"data.{name} is {value}, but must be at least {least}.")
        if long_side < short_side:
            raise SettingError(f"data.long_side ({long_side}) is less than data.short_side ({short_side}).")
        if batching == "padded" and batch_size is None:
            raise SettingError("data.batching padded needs data.batch_size: its results depend on it.")
        self.save_hyperparameters()
        self.image_dir = os.path.expanduser(image_dir)
        self.annotation_file = None if annotation_file is None else os.path.expanduser(annotation_file)
        self.batch_size = batch_size
        self.on_error = on_error
        self.resize = partial(resized_size, short_side=short_side, long_side=long_side)
        self.records: list[ImageRecord] = []
        self.categories: dict[int, str] = {}
        self.failures: list[Failure] = []
        self._known_ids: Mapping[str, int] = {}
        self._ready = False
        self._ground_truth: dict[str, Any] | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What happens to an image before the model sees it: part of what identifies a run."""
        return {name: self.hparams[name] for name in ("short_side", "long_side", "image_backend")}

    @property
    def batching(self) -> str:
        """How images share batches, as far as results depend on it."""
        batching: str = self.hparams["batching"]
        return batching if batching == "exact" else f"{batching}, {self.batch_size}"

    def prepare_data(self) -> None:
        """Download what is missing, if asked to. Lightning calls it in one process of each node."""
        if self.hparams["download"]:
            from detr_lightning.data.download import download_val2017

            annotation_file = None if self.annotation_file is None else Path(self.annotation_file)
            download_val2017(Path(self.image_dir), annotation_file)

    def setup(self, stage: str | None = None) -> None:
        """Find the images and their sizes on rank 0, and the annotations that validation needs; tell the other ranks.

        Raises:
            FileNotFoundError: The folder or the annotation file is not there.
            ValueError: What they hold cannot be used; the message names the entry.
            SettingError: The Trainer is to validate with a part of the batches.
            UnreadableImageError: A header cannot be read, and `on_error` is `raise`.
        """
        if stage == "validate" and self.trainer is not None:
            require_all_batches(self.trainer, "val")

        def find() -> tuple[list[ImageRecord], list[Failure], dict[int, str]]:
            self.find_images()
            if stage == "validate":
                self.ground_truth()
            return self.images

        self.images = find() if self.trainer is None else from_rank_0(self.trainer, find)

    def find_images(self) -> None:
        """Find the images in this process alone; see `setup`."""
        self.images = self._select()

    @property
    def images(self) -> tuple[list[ImageRecord], list[Failure], dict[int, str]]:
        """All that `setup` found: the images, those that cannot be read, and the categories."""
        return self.records, self.failures, self.categories

    @images.setter
    def images(self, found: tuple[list[ImageRecord], list[Failure], dict[int, str]]) -> None:
        self.records, self.failures, self.categories = found
        self._ready = True

    def _select(self) -> tuple[list[ImageRecord], list[Failure], dict[int, str]]:
        if self._ready:
            return self.images
        records, failures = self.find()
        unusable = dict(failures)
        chosen = select([*records, *unusable], self.hparams["image_ids"], self.hparams["limit"])
        found: tuple[list[ImageRecord], list[Failure], dict[int, str]] = ([], [], self.categories)
        for record in chosen:
            reason = unusable.get(record)
            if reason is None:
                try:
                    self.resize(record.size)
                except ValueError as error:
                    reason = str(error)
            if reason is None:
                found[0].append(record)
            elif self.on_error == "raise":
                raise self._unreadable(record.file_name, reason)
            else:
                found[1].append((record, reason))
        return found

    def find(self) -> tuple[list[ImageRecord], list[Failure]]:
        """Return all images that there are, and those whose size cannot be read."""
        failures: list[Failure] = []
        max_pixels = self.hparams["max_image_pixels"]
        if self.annotation_file is None:
            return read_folder(self.image_dir, self._known_ids, max_pixels)
        records, self.categories = read_coco(self.image_dir, self.annotation_file, failures, max_pixels)
        named = [record.file_name for record in [*records, *(record for record, _reason in failures)]]
        if not any(os.path.isfile(os.path.join(self.image_dir, name)) for name in named):
            raise FileNotFoundError(
                f"none of the {len(named)} images of {self.annotation_file} is in {self.image_dir}: no {named[0]!r}. "
                "Set data.image_dir to the folder that their names are relative to."
            )
        return records, failures

    def reader(self) -> Reader:
        """Return what reads an image at a size: uint8 `[3, height, width]`. It travels to the data workers."""
        image_folder(self.image_dir)
        return partial(read_file, self.image_dir, self.hparams["image_backend"], self.hparams["max_image_pixels"])

    def keep_ids(self, known: Mapping[str, int]) -> None:
        """Let the files of a folder without annotations keep the ids that an earlier run gave them.

        Args:
            known: Ids by file name.
        """
        if self.annotation_file is None and known != self._known_ids:
            self._known_ids = known
            self._ready = False

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches of the images that no callback, such as `EmbeddingWriter`, has already."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        return self._loader(frozenset().union(*(getattr(callback, "finished", ()) for callback in callbacks)))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches of all images."""
        return self._loader(frozenset())

    def ground_truth(self) -> dict[str, Any]:
        """Return the annotations of the images as a COCO dataset.

        Raises:
            SettingError: There is no annotation file.
            InputError: There is no annotation for the images, or one of them is not COCO's.
        """
        if self.annotation_file is None:
            raise SettingError("data.annotation_file is not set: validation needs COCO annotations to compare with.")
        if self._ground_truth is None:
            content = read_coco_file(self.annotation_file, "boxes")
            self._ground_truth = content.ground_truth({record.image_id for record in self.records})
        return self._ground_truth

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Stop at an unreadable image, unless it is to be skipped: here, since an error in a worker arrives garbled.

        Raises:
            UnreadableImageError: An image of the batch could not be read, and `on_error` is `raise`.
        """
        if batch["failed"] and self.on_error == "raise":
            image_id, reason = batch["failed"][0]
            names = {record.image_id: record.file_name for record in self.records}
            raise self._unreadable(names[image_id], reason)
        return batch

    def _unreadable(self, file_name: str, reason: str) -> UnreadableImageError:
        return UnreadableImageError(
            f"{file_name!r} in {self.image_dir}: {reason}. Repair or remove it, or leave it out: data.on_error=skip.",
            reason,
        )

    def _batch_size(self, trainer: Trainer | None) -> int:
        return self.batch_size or (4 if trainer is None or trainer.strategy.root_device.type == "cpu" else 8)

    def workers(self, trainer: Trainer | None) -> int:
        """Return the number of data workers of each rank.

        Raises:
            SettingError: `num_workers` asks for more than the shared memory has room for.
        """
        asked: int | None = self.hparams["num_workers"]
        if asked is None and (trainer is None or trainer.strategy.root_device.type == "cpu"):
            return 0
        ranks = trainer.num_devices if trainer else 1
        most = max(1, min(8, available_cores() // ranks - 1)) if asked is None else asked
        free = free_shared_memory()
        if not most or free is None:
            return most
        pixels = max((height * width for height, width in (self.resize(r.size) for r in self.records)), default=0)
        batch = 3 * pixels * min(self._batch_size(trainer), max(1, len(self.records)))
        each = PREFETCHED_BATCHES * batch * ranks
        room = free // max(1, each)
        if asked is not None and asked > room:
            raise SettingError(
                f"data.num_workers is {asked}: they need up to {asked * each / 1e6:.0f} MB of shared memory, and "
                f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free. Use at most {room}, a smaller data.batch_size, or give "
                "the container more: docker run --shm-size=2g."
            )
        return min(most, room)

    def _loader(self, finished: Collection[int]) -> DataLoader[Any]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device.type if trainer else "cpu"
        batch_size = self._batch_size(trainer)
        batches = plan_batches(
            self.records, self.resize, batch_size, self.hparams["batching"], finished, rank, world_size
        )
        # Without a batch Lightning would skip the hooks in which ranks meet: an empty one keeps them.
        padded = self.hparams["batching"] == "padded"
        dataset = ImageBatches(batches or [[]], self.reader(), self.resize, padded)
        workers = self.workers(trainer)
        return DataLoader(
            dataset,
            # The batches are this rank's already. Lightning leaves a DistributedSampler alone, and would replace any
            # other by one that shares out the shares again.
            sampler=DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False),
            batch_size=1,
            collate_fn=unwrap,
            num_workers=workers,
            # Lance cannot be forked.
            multiprocessing_context="spawn" if workers and "lance" in sys.modules else None,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=device == "cuda",
        )
