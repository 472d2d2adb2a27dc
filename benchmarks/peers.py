"""The peers, each as a user would write it: a model, a loop, `torch.save`.

A peer is created once. It has `forward(pixels)`, the model alone on normalized images `[B, 3, h, w]`, and
`job(paths, folder, batch_size)`, the whole job from files to files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_lightning.format.preprocessing import IMAGENET_MEAN, IMAGENET_STD, resized_size


class Peer:
    """The base class of the peers: reads images in a worker process, and saves a dict for each image.

    Args:
        dtype: The dtype of the model.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run the model on normalized images."""
        return self.outputs(pixels, torch.zeros(len(pixels), *pixels.shape[2:], dtype=torch.bool))

    def outputs(self, pixels: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        """Run the model on normalized images with a mask, True on padding."""
        raise NotImplementedError

    def job(self, paths: Sequence[Path], folder: Path, batch_size: int) -> None:
        """Read images, run the model on batches padded to their largest, write a file for each."""
        loader = DataLoader(Images(paths), batch_size=batch_size, num_workers=1, collate_fn=pad)
        with torch.inference_mode():
            for names, pixels, padding_mask in loader:
                outputs = self.outputs(pixels, padding_mask)
                for index, name in enumerate(names):
                    torch.save(
                        {key: value[index].float().cpu().clone() for key, value in outputs.items()}, folder / name
                    )


class Official(Peer):
    """facebookresearch/detr, its own code from a checkout, with hooks for the tensors that it does not return.

    Args:
        checkout: The folder of the checkout.
    """

    def __init__(self, dtype: torch.dtype, checkout: Path) -> None:
        super().__init__(dtype)
        sys.path.insert(0, str(checkout))
        import models.backbone
        from models.backbone import Backbone, Joiner
        from models.detr import DETR
        from models.position_encoding import PositionEmbeddingSine
        from models.transformer import Transformer
        from util.misc import NestedTensor

        models.backbone.is_main_process = lambda: False  # no ImageNet weights: they would be downloaded
        self.nested = NestedTensor
        backbone = Joiner(Backbone("resnet50", False, False, False), PositionEmbeddingSine(128, normalize=True))
        backbone.num_channels = 2048
        transformer = Transformer(d_model=256, return_intermediate_dec=True)
        self.model = DETR(backbone, transformer, num_classes=91, num_queries=100).eval().to(self.device, dtype)
        self.kept: dict[str, Tensor] = {}
        self.model.transformer.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        decoder_output, memory = output
        self.kept = {
            "decoder_output": decoder_output.transpose(0, 1),
            "query_embeddings": decoder_output[-1],
            "encoder_output": memory.flatten(2).transpose(1, 2),
        }

    def outputs(self, pixels: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        """Run the model on normalized images with a mask, True on padding."""
        out = self.model(self.nested(pixels.to(self.device, self.dtype), padding_mask.to(self.device)))
        return {**self.kept, "pred_logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]}


class HuggingFace(Peer):
    """Hugging Face transformers' DETR with `output_hidden_states=True`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        from transformers import DetrConfig, DetrForObjectDetection

        config = DetrConfig(use_timm_backbone=True, backbone="resnet50", use_pretrained_backbone=False, num_labels=91)
        self.model = DetrForObjectDetection(config).eval().to(self.device, dtype)

    def outputs(self, pixels: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        """Run the model on normalized images with a mask, True on padding."""
        out = self.model(
            pixels.to(self.device, self.dtype),
            pixel_mask=(~padding_mask).long().to(self.device),
            output_hidden_states=True,
        )
        return {
            "decoder_output": torch.stack(out.decoder_hidden_states[1:], dim=1),
            "query_embeddings": out.last_hidden_state,
            "encoder_output": out.encoder_last_hidden_state,
            "pred_logits": out.logits,
            "pred_boxes": out.pred_boxes,
        }


class Images(Dataset[tuple[str, Tensor]]):
    """Images as the official evaluation reads them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        image = Image.open(self.paths[index]).convert("RGB")
        height, width = resized_size((image.height, image.width))
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        return f"{self.paths[index].stem}.pt", F.normalize(F.to_tensor(resized), IMAGENET_MEAN, IMAGENET_STD)


def pad(items: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor, Tensor]:
    """Join images into a batch padded with zeros at the bottom and right, with a mask that is True there."""
    names, images = zip(*items, strict=True)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width)
    padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = image
        padding_mask[index, : image.shape[1], : image.shape[2]] = False
    return list(names), pixels, padding_mask
