"""The callback that keeps embeddings in memory, as the files would store them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from detr_lightning.batch import HostBatch, sizes_of_batch, split, to_stored
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.errors import check_choice
from detr_lightning.extraction.layouts import planned_images
from detr_lightning.extraction.provenance import provenance
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.keys import DTYPES, FeatureSizes, dtype_of
from detr_lightning.format.schema import Metadata


class EmbeddingCollector(Callback):
    """Keeps the tensors of each image in memory.

    Args:
        dtype: The dtype of embeddings, `float32` or `float16`. Logits and boxes stay float32.

    Attributes:
        tensors: Each image's tensors, by image id.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = check_choice("writer.dtype", dtype, DTYPES)
        self.tensors: dict[int, dict[str, Tensor]] = {}
        self._features: dict[int, FeatureSizes] = {}
        self._failed: dict[int, str] = {}
        self._details: dict[int, dict[str, Any]] = {}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Keep a batch.

        Raises:
            InputError: A value is not finite, or does not fit into `dtype`.
        """
        self._failed.update(batch["failed"])
        self._details.update(batch.get("details", {}))
        arrived = HostBatch(outputs)
        arrived.wait()
        for (image_id, tensors), features in zip(split(arrived.tensors), sizes_of_batch(outputs), strict=True):
            with torch.inference_mode(False), torch.no_grad():  # so that a probe can be trained on them
                self.tensors[image_id] = {
                    key: to_stored(key, image_id, tensor, dtype_of(key, self.dtype)) for key, tensor in tensors.items()
                }
            self._features[image_id] = features

    def metadata(self, trainer: Trainer, model: DETRExtractor, data: COCODataModule) -> Metadata:
        """Return the metadata that a folder of these embeddings would have."""
        planned, failed = planned_images(data)
        images: list[ImageEntry] = []
        for entry in planned:
            if entry.image_id in self.tensors:
                size = sum(tensor.nbytes for tensor in self.tensors[entry.image_id].values())
                details = self._details.get(entry.image_id, {})
                images.append(replace(entry, features=self._features[entry.image_id], bytes=size, **details))
            else:
                reason = self._failed.get(entry.image_id, "it was not computed")
                failed.append(SkippedImage(entry.image_id, entry.file_name, reason))
        return Metadata(
            run=provenance(trainer, model, data, {"dtype": self.dtype, "min_score": None}),
            images=sorted(images, key=lambda entry: entry.image_id),
            failed=sorted(failed, key=lambda entry: entry.image_id),
        )
