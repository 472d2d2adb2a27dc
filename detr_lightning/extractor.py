"""DETR as a LightningModule: embeddings from `predict_step`, detection metrics from `validation_step`."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import detr_lightning
from detr_lightning.batch import check_finite, sizes_to_batch
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.detections import METRICS, best_detections, coco_results, evaluate, to_coco_ids
from detr_lightning.errors import DETRLightningWarning, IncompleteError, InputError, SettingError, count
from detr_lightning.format.keys import PREDICTIONS, FeatureSizes, resolve_keys
from detr_lightning.model.checkpoints import load
from detr_lightning.model.detr import DETR, fold
from detr_lightning.model.family import FamilyDetector
from detr_lightning.model.labels import compare_names
from detr_lightning.model.replay import Replay
from detr_lightning.ranks import gather
from detr_lightning.system import allow_tf32, keep_freed_memory


class DETRExtractor(LightningModule):
    """A LightningModule that returns the embeddings of a DETR.

    The weights are loaded by the constructor. `setup`, which a Trainer calls, builds the network that runs, with the
    norms folded into the convolutions and in the Trainer's precision. `detr` stays as it was loaded.

    Args:
        weights: An official name such as `detr_resnet50`, a `.pth` or `.ckpt` file with a DETR, a
            Hugging Face folder or hub id of a DETR or a related model (`PekingU/rtdetr_v2_r50vd`), or `random`
            (DETR-R50, seeded).
        extract_type: Which tensors to keep: `all`, `decoder`, `encoder` or `backbone`.
        keys: Exactly these tensors instead, such as `[query_embeddings, pred_boxes]`. Available: `backbone_features`,
            `encoder_output`, `decoder_output`, `query_embeddings`, `pred_logits`, `pred_boxes` and, only if listed
            here, `cross_attention` and `encoder_layers`.
        nheads: Attention heads, if the checkpoint does not state them.
        dilation: Whether the last stage is dilated (DC5), if the checkpoint does not state it.
        ema: Use the averaged (EMA) weights of a file that also contains others.
        compile: Compile the network with `torch.compile`.
        tf32: Let float32 matrix products and convolutions on a GPU round their inputs to TensorFloat-32.
        plan_only: Do not download missing official weights. The model can then plan a run, but not run.

    Raises:
        SettingError: An extract type or key does not exist, or a setting does not suit the model.
        InputError: The weights are not those of a supported model.
        FileNotFoundError: The weights do not exist.
    """

    def __init__(
        self,
        weights: str = "detr_resnet50",
        extract_type: str = "decoder",
        keys: list[str] | None = None,
        nheads: int | None = None,
        dilation: bool | None = None,
        ema: bool | None = None,
        compile: bool = False,
        tf32: bool = False,
        plan_only: bool = False,
    ) -> None:
        super().__init__()
        self.keys = resolve_keys(extract_type, keys)
        weights = os.fspath(weights)  # A Path cannot be written to the metadata.
        self.save_hyperparameters(ignore=["plan_only"])
        self.checkpoint = load(weights, nheads, dilation, ema, plan_only)
        if missing := [key for key in self.keys if key not in self.detr.keys]:
            raise SettingError(
                f"{self.checkpoint.name}, a {self.checkpoint.family}, has no {missing[0]}. "
                f"It has {', '.join(self.detr.keys)}: choose from these with model.keys."
            )
        if compile and not isinstance(self.detr, DETR):
            raise SettingError(f"model.compile works only with DETR, and {weights} is a {self.checkpoint.family}.")
        self.further_keys: tuple[str, ...] = ()
        """Further keys that `predict_step` returns, for a writer that needs them."""
        self.network: DETR | FamilyDetector | None = None
        self._replay: Replay | None = None
        self.results: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.validated: list[int] = []
        self.skipped: list[tuple[int, str]] = []
        self._sizes: dict[int, tuple[int, int]] = {}

    @property
    def detr(self) -> DETR | FamilyDetector:
        """The model as loaded, in float32 on the CPU; a DETR has the official `state_dict`."""
        return self.checkpoint.model

    @property
    def category_names(self) -> dict[int, str]:
        """The checkpoint's category names, by COCO category id or else by logit; empty if it has none."""
        ids = self.checkpoint.category_ids
        names = self.checkpoint.category_names or {}
        return {index if ids is None else ids[index]: name for index, name in names.items()}

    @property
    def _data(self) -> COCODataModule:
        data: COCODataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def setup(self, stage: str | None = None) -> None:
        """Build the network that runs, before Lightning moves it to its device and precision."""
        self._build(None)

    def _build(self, dtype: torch.dtype | None) -> None:
        if not self.checkpoint.sha256:
            raise SettingError(
                f"The weights of {self.checkpoint.name} are not on this machine, so it can only plan a run."
            )
        keep_freed_memory()
        allow_tf32(self.hparams["tf32"])
        network = fold(self.detr, dtype) if isinstance(self.detr, DETR) else self.detr.for_inference(dtype)
        self.network = network.to(self.device)
        self._replay = None
        if self.hparams["compile"]:
            self.network.compile()
        elif isinstance(self.network, DETR):
            self._replay = Replay(self.network)

    def forward(
        self, pixels: Tensor, padding_mask: Tensor | None = None, keys: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """Return batch-first tensors for pixels `[B, 3, h, w]`; see `DETR.forward` and `FamilyDetector.forward`.

        On a CPU, the images of a batch go through the network one by one: the features of one image fit into the
        caches, memory does not grow with the batch, and the results are bit-identical for any composition of batches.
        """
        if self.network is None:  # without a Trainer
            assert isinstance(self.dtype, torch.dtype)
            self._build(self.dtype)
        assert self.network is not None
        keys = keys or self.keys
        if pixels.is_cuda and padding_mask is None and self._replay is not None and torch.is_inference_mode_enabled():
            return self._replay(pixels, keys)
        if pixels.device.type != "cpu" or len(pixels) == 1:
            out: dict[str, Tensor] = self.network(pixels, padding_mask, keys)
            return out
        masks = [None] * len(pixels) if padding_mask is None else padding_mask.split(1)
        single = [self.network(*one, keys) for one in zip(pixels.split(1), masks, strict=True)]
        return {name: torch.cat([out[name] for out in single]) for name in single[0]}

    def extract(self, images: Any, annotation_file: Any = None, **settings: Any) -> detr_lightning.EmbeddingStore:
        """Extract embeddings with this model, which is loaded once; see `detr_lightning.extract`.

        Args:
            images: A folder, an image file, a PIL image, or a list of files and PIL images.
            annotation_file: COCO annotations for a folder.
            **settings: Further arguments of `detr_lightning.extract`, except the model's.
        """
        return detr_lightning.extract(images, annotation_file, model=self, **settings)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the embeddings of a batch.

        Args:
            batch: A batch of `COCODataModule`.
            batch_idx: Not used.
            dataloader_idx: Not used.

        Returns:
            `image_id` (list of int), `feature_size` (list of height and width), a batch-first tensor for each key, and,
            if images were padded, `padding_mask` `[B, H, W]` at feature size. Models with several levels have
            `feature_sizes` (for each image a list of sizes) and `backbone_size` instead of `feature_size`.
            `batch.split` splits them into images. The tensors are on the model's device, and can be used for training.
        """
        if not batch["image_id"]:
            return {"image_id": [], "feature_size": []}
        keys = tuple(dict.fromkeys((*self.keys, *self.further_keys)))
        tensors = self(batch["pixels"], batch.get("padding_mask"), keys)
        if "padding_mask" in tensors:
            rows, columns = (
                (~tensors["padding_mask"]).any(axis).sum(1).tolist()
                for axis in (2, 1)  # [B, H, W]
            )
            features = [FeatureSizes.single(size) for size in zip(rows, columns, strict=True)]
        else:
            features = [self.detr.architecture.feature_sizes(size) for size in batch["input_size"]]
        names = [*keys, *(["padding_mask"] if "padding_mask" in tensors else [])]
        # A tensor cloned outside of inference mode can enter autograd.
        with torch.inference_mode(False), torch.no_grad():
            kept = {name: tensors[name].clone() if tensors[name].is_inference() else tensors[name] for name in names}
        return {"image_id": batch["image_id"], **sizes_to_batch(features)} | kept

    def warn_of_names(self, data: COCODataModule) -> None:
        """Warn if the annotations and the checkpoint name categories differently."""
        differences, _ = compare_names(self.category_names, data.categories)
        if differences:
            warnings.warn(
                f"{data.annotation_file} and {self.checkpoint.name} name categories differently: {differences}.",
                DETRLightningWarning,
                stacklevel=2,
            )

    def on_validation_start(self) -> None:
        """Check that the model's categories match those of the annotations.

        Raises:
            SettingError: The model has no logit for a category of the annotations.
            InputError: Not a single category has the same name in the annotations and the checkpoint.
        """
        data = self._data
        self.results, self.validated, self.skipped = [], [], []
        self._sizes = {record.image_id: record.size for record in data.records}
        highest = self.detr.architecture.num_logits - 1 - (self.checkpoint.scoring == "softmax")
        known = self.checkpoint.category_ids or range(highest + 1)
        beyond = {i: name for i, name in data.categories.items() if i not in known}
        if beyond:
            some = ", ".join(f"{i} ({name})" for i, name in list(beyond.items())[:5])
            raise SettingError(
                f"The annotations have categories that the model has no logit for: {some}. "
                f"Its logits are the category ids {min(known)} to {max(known)}; use weights trained on these "
                "categories."
            )
        differences, none_agrees = compare_names(self.category_names, data.categories)
        if none_agrees:
            raise InputError(
                f"No category of {data.annotation_file} has the same name as in {self.checkpoint.name}: "
                f"{differences}. Use annotations with the model's ids, or a model trained on these categories."
            )
        if self.trainer.is_global_zero:
            self.warn_of_names(data)

    def validation_step(self, batch: dict[str, Any], batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Collect the detections of a batch, in pixels of the original images.

        Raises:
            InputError: The model's predictions for an image are not finite.
        """
        self.skipped += batch["failed"]
        if not batch["image_id"]:
            return
        tensors = self(batch["pixels"], batch.get("padding_mask"), PREDICTIONS)
        logits, boxes = (tensors[key].cpu() for key in PREDICTIONS)
        for index, image_id in enumerate(batch["image_id"]):
            for key, tensor in zip(PREDICTIONS, (logits[index], boxes[index]), strict=True):
                check_finite(key, image_id, tensor)
            found = best_detections(logits[index], boxes[index], self._sizes[image_id], self.checkpoint.scoring)
            self.results += coco_results(image_id, to_coco_ids(found, self.checkpoint.category_ids))
            self.validated.append(image_id)

    def on_validation_epoch_end(self) -> None:
        """Compute COCO's twelve metrics over the readable images of all ranks, and log them.

        Raises:
            IncompleteError: An image was neither validated nor skipped, or all were skipped.
        """
        data = self._data
        shares = gather(self.trainer, (self.results, self.validated, self.skipped))
        results, self.validated, self.skipped = (
            [one for part in parts for one in part] for parts in zip(*shares, strict=True)
        )
        if self.trainer.is_global_zero:
            missing = {record.image_id for record in data.records}.difference(self.validated, dict(self.skipped))
            if missing or not self.validated:
                raise IncompleteError(
                    f"Of {count(len(data.records), 'image')} {len(self.validated)} were validated and "
                    f"{len(self.skipped)} could not be read: there is nothing to report."
                )
            self.metrics = evaluate(data.ground_truth(), results, self.validated)
        self.metrics = self.trainer.strategy.broadcast(self.metrics)
        # The metrics are equal on all ranks, so their mean changes nothing; Lightning warns without sync_dist.
        self.log_dict({name: self.metrics[name] for name in METRICS}, sync_dist=True)
