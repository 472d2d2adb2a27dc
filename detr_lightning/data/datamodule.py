"""The LightningDataModule of a run's images."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from detr_lightning.data.batching import plan_batches
from detr_lightning.data.decode import Processor
from detr_lightning.data.folder_images import FolderImages
from detr_lightning.data.headers import hash_files
from detr_lightning.data.images import Choice, Images, unreadable_image
from detr_lightning.data.loading import ImageBatches, ImageReader, data_workers, image_loader
from detr_lightning.data.records import Failure, ImageRecord
from detr_lightning.data.selection import plain_image_ids
from detr_lightning.data.settings import ModelInput, check_settings, with_settings
from detr_lightning.data.sources import NONE_KNOWN, COCOImages, ImageSource, Known
from detr_lightning.errors import InputError, SettingError, count
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.gpu import to_device
from detr_lightning.ranks import from_rank_0


def require_all_batches(trainer: Trainer, stage: Literal["predict", "val"]) -> None:
    """Refuse a Trainer that would leave images out.

    Raises:
        SettingError: The Trainer limits the number of batches.
    """
    limit = getattr(trainer, f"limit_{stage}_batches")
    if isinstance(limit, int) or limit != 1.0:
        raise SettingError(
            f"trainer.limit_{stage}_batches (or trainer.fast_dev_run, trainer.overfit_batches) ends the run early "
            f"({limit}). Results need every image: select images with data.limit or data.image_ids."
        )


class COCODataModule(LightningDataModule):
    """COCO images, or any folder of images, in batches.

    Args:
        image_dir: The folder with the images.
        annotation_file: COCO's `instances_*.json` for them. Without it, every image in the folder and its subfolders is
            used (`.jpg`, `.jpeg`, `.png`, `.bmp`, `.webp`, `.tif`, `.tiff`; `.avif` if Pillow reads it, `.heic` and
            `.heif` if pillow-heif is installed), and sizes come from the headers.
        image_ids: Use only these images: a list of ids or file names, or a text file with one per line.
        limit: Use only this many images, the first by id.
        shuffle_seed: Select those `limit` images at random instead; the same seed gives the same images.
        batch_size: The maximum number of images in a batch. It affects speed and memory, but with `exact` batching no
            results. By default 4 on a CPU, which reads that many at a time and computes them one by one, and 8
            elsewhere.
        num_workers: The number of processes that read images. By default none on a CPU, where they would compete with
            the model for cores; elsewhere one less than the device's share of the cores, at least 1 and at most 8.
        batching: `exact` puts only images of the same resized size in a batch, so that nothing is padded and no image
            affects another's embeddings. `padded` pads smaller images as the official code does, in the order of ids.
        image_backend: `pil` gives the official pixels bit for bit; `torchvision` is faster, and within 1 of 255 levels.
        exif: `ignore` takes pixels as they are stored, as the official code does; `apply` turns images by their EXIF
            tag. Sizes and boxes are then those of the turned image.
        on_error: What to do if an image cannot be read: `raise`, or `skip` it and list it in the metadata.
        fingerprint: How a resumed run recognizes a finished image: `names` compares the name and the size in pixels;
            `content` also records the sha256 of the file, and reads the files of all finished images to compare it.
        short_side: The short side of an image after resizing; by default that of the model's training, 800 for the
            official models.
        long_side: The upper limit of the long side; by default that of the model's training, 1333 for the official
            models.
        max_image_pixels: Refuse larger images as decompression bombs; by default Pillow's limit, 89 million. Reading an
            image takes at most 12 bytes of memory per pixel, so 1.1 GB with that limit.
        download: Download COCO val2017 (1 GB) to `image_dir` and `annotation_file` if they are missing.

    Raises:
        SettingError: A setting is not allowed; the message names the allowed values.
        SettingTypeError: `image_ids` is neither a collection of ids and file names nor a file.
    """

    def __init__(
        self,
        image_dir: str,
        annotation_file: str | None = None,
        image_ids: list[int | str] | str | None = None,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        batching: str = "exact",
        image_backend: str = "pil",
        exif: str = "ignore",
        on_error: str = "raise",
        fingerprint: str = "names",
        short_side: int | None = None,
        long_side: int | None = None,
        max_image_pixels: int | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        # Absolute, since the metadata may be read from other folders.
        image_dir = os.path.abspath(os.path.expanduser(image_dir)) if image_dir else ""
        annotation_file = None if annotation_file is None else os.path.abspath(os.path.expanduser(annotation_file))
        image_ids = plain_image_ids(image_ids)
        self.save_hyperparameters()
        check_settings(self.hparams)
        self.image_dir, self.annotation_file = image_dir, annotation_file
        self.source: ImageSource = FolderImages(image_dir)
        if annotation_file is not None:
            self.source = COCOImages(image_dir, annotation_file)
        self.batch_size = batch_size
        self._choice = Choice(image_ids, limit, shuffle_seed, exif, max_image_pixels, on_error)
        self.records: list[ImageRecord] = []
        self.categories: dict[int, str] = {}
        self.failures: list[Failure] = []
        self._known = NONE_KNOWN
        self._ready = False
        self._ground_truth: dict[str, Any] | None = None
        self._processor: Processor | None = None
        self.input = Preprocessing()
        self._use(self.input)

    @classmethod
    def of(cls, source: ImageSource, **settings: Any) -> COCODataModule:
        """Return a data module for the images of a source.

        Args:
            source: The images. Not an argument of `__init__`, whose arguments Lightning copies.
            **settings: The settings of `COCODataModule`, except the first two.
        """
        data = cls("", **settings)
        data.source = source
        return data

    def use_model(self, checkpoint: ModelInput) -> None:
        """Preprocess images as in the model's training, except for `short_side` and `long_side` if they are set.

        `setup` calls this for the model of its Trainer.

        Raises:
            SettingError: The model does not allow a setting, or the long side is less than the short side.
        """
        self._use(checkpoint.preprocessing, checkpoint.processor)

    def _use(self, preprocessing: Preprocessing, processor: Processor | None = None) -> None:
        used = with_settings(preprocessing, processor, self.hparams)
        self._ready = self._ready and used == self.input
        self.input, self._processor = used, processor
        self.resize = used.input_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The settings of the preprocessing, which are part of a run's identity."""
        exif = {"exif": self.hparams["exif"]}
        if self.input.processor is not None:
            return {**self.input.to_json(), **exif}
        sides = {"short_side": self.input.short_side, "long_side": self.input.long_side}
        if self.input.height is not None:
            sides |= {"height": self.input.height, "width": self.input.width}
        return {**sides, "image_backend": self.hparams["image_backend"], **exif}

    @property
    def known(self) -> Mapping[str, Known]:
        """Images of earlier runs by file name; see `ImageSource.find`."""
        return self._known

    @known.setter
    def known(self, known: Mapping[str, Known]) -> None:
        self._ready = self._ready and known == self._known
        self._known = known

    @property
    def batching(self) -> str:
        """The batching, with the batch size if results depend on it."""
        batching: str = self.hparams["batching"]
        return batching if batching == "exact" else f"{batching}, {self.batch_size}"

    @property
    def hash_files(self) -> Callable[[Collection[int]], dict[int, str]] | None:
        """A function that returns the sha256 of these images' files by id; None unless `fingerprint` is `content`."""
        if self.hparams["fingerprint"] == "names":
            return None
        return lambda image_ids: hash_files(self.source, [r for r in self.records if r.image_id in image_ids])

    def prepare_data(self) -> None:
        """Download missing files if `download` is set. Lightning calls this in one process of each node."""
        if self.hparams["download"]:
            from detr_lightning.data.download import download_val2017

            annotation_file = None if self.annotation_file is None else Path(self.annotation_file)
            download_val2017(Path(self.image_dir), annotation_file)

    def setup(self, stage: str | None = None) -> None:
        """Find the images, their sizes and, for validation, the annotations on rank 0; send the images to all ranks.

        Raises:
            FileNotFoundError: A folder or file that the settings name does not exist.
            InputError: The content of a file cannot be used; the message names the entry.
            SettingError: The Trainer limits the batches of a validation, or a setting does not fit the model or images.
            UnreadableImageError: An image cannot be used, and `on_error` is `raise`.
        """
        model = getattr(self.trainer, "lightning_module", None)
        if model is not None and hasattr(model, "checkpoint"):
            self.use_model(model.checkpoint)
        if stage == "validate" and self.trainer is not None:
            require_all_batches(self.trainer, "val")

        def find() -> Images:
            self.find_images(validate=stage == "validate")
            return self.images

        self.images = find() if self.trainer is None else from_rank_0(self.trainer, find)

    def find_images(self, validate: bool = False) -> None:
        """Find the images in this process only; see `setup`.

        Args:
            validate: Also read the annotations, and the headers of all images.
        """
        if validate and self._ground_truth is None:
            self._ready = False
            if isinstance(self.source, COCOImages):
                self.source.read_annotations()
        if not self._ready:
            self.images = self._choice.find(self.source, self.resize, self.known, every_header=validate)
        if validate and not self.records:
            record, reason = self.failures[0]
            raise InputError(
                f"None of {count(len(self.failures), 'image')} can be read: {record.file_name!r}: {reason}."
            )
        if validate:
            self.ground_truth()

    @property
    def images(self) -> Images:
        """Everything that `setup` found: the images, those that cannot be used, and the categories."""
        return Images(self.records, self.failures, self.categories)

    @images.setter
    def images(self, found: Images) -> None:
        self.records, self.failures, self.categories = found
        self._ready = True

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches, without the images that every callback such as `EmbeddingWriter` has finished."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        finished = [callback.finished for callback in callbacks if hasattr(callback, "finished")]
        return self._loader(frozenset.intersection(*finished) if finished else frozenset())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches of all images."""
        return self._loader(frozenset())

    def ground_truth(self) -> dict[str, Any]:
        """Return the annotations of the images as a COCO dataset.

        Raises:
            SettingError: `annotation_file` is not set.
            FileNotFoundError: The annotation file does not exist.
            InputError: The annotation file cannot be used, or has no annotations for the images.
        """
        if self.annotation_file is None:
            raise SettingError("data.annotation_file is not set: validation needs COCO annotations to compare with.")
        if self._ground_truth is None:
            source = COCOImages(self.image_dir, self.annotation_file)
            if isinstance(self.source, COCOImages):
                source = self.source
            self._ground_truth = source.ground_truth(record.image_id for record in self.records)
        return self._ground_truth

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Stop at an unreadable image unless `on_error` is `skip`. An error in a data worker would arrive garbled.

        Raises:
            UnreadableImageError: An image of the batch could not be read, and `on_error` is `raise`.
        """
        if batch["failed"] and self.hparams["on_error"] == "raise":
            image_id, reason = batch["failed"][0]
            names = {record.image_id: record.file_name for record in self.records}
            raise unreadable_image(self.source, names[image_id], reason)
        return batch

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move a batch to the model's device."""
        return to_device(batch, device)

    def _batch_size(self, trainer: Trainer | None) -> int:
        return self.batch_size or (4 if trainer is None or trainer.strategy.root_device.type == "cpu" else 8)

    def workers(self, trainer: Trainer | None) -> int:
        """Return the number of data workers of each rank.

        Raises:
            SettingError: The shared memory has no room for `num_workers` data workers.
        """
        ranks, device = (trainer.num_devices, trainer.strategy.root_device.type) if trainer else (1, "cpu")
        pixels = max((height * width for height, width in (self.resize(r.size) for r in self.records)), default=0)
        batch = min(self._batch_size(trainer), max(1, len(self.records)))
        return data_workers(self.hparams["num_workers"], device, ranks, 3 * pixels * batch)

    def _loader(self, finished: Collection[int]) -> DataLoader[Any]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device.type if trainer else "cpu"
        batch_size = self._batch_size(trainer)
        batches = plan_batches(
            self.records, self.resize, batch_size, self.hparams["batching"], finished, rank, world_size
        )
        reader = ImageReader(
            self.source,
            self.hparams["image_backend"],
            self.hparams["max_image_pixels"],
            self.hparams["exif"],
            self._processor,
            self.hparams["fingerprint"],
        )
        # Without any batch, Lightning would skip the hooks in which ranks synchronize: an empty one keeps them.
        images = ImageBatches(batches or [[]], reader, self.resize, self.hparams["batching"] == "padded")
        return image_loader(images, self.workers(trainer), device)
