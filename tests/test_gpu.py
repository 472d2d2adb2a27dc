"""On a GPU: the CPU's numbers, whatever shortens the way. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco

from detr_lightning import DETRExtractor, EmbeddingStore
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.format.keys import KEYS
from detr_lightning.model.detr import cudnn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def pixels(batch: int, height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return made.contiguous(memory_format=torch.channels_last)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.cpu().double() - b.cpu().double()).norm() / b.cpu().double().norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_replayed_batches_are_the_networks(tiny_weights: Path, dtype: torch.dtype, most: float) -> None:
    """Shapes come and go, and the pixels differ each time; what an earlier batch returned stays as it was."""
    reference = DETRExtractor(str(tiny_weights), keys=list(KEYS))
    extractor = DETRExtractor(str(tiny_weights), keys=list(KEYS)).cuda().to(dtype)
    shapes = [(2, 96, 128)] * 4 + [(3, 128, 96)] * 3 + [(1, 96, 128)] * 2
    returned = []
    with torch.inference_mode():
        for seed, shape in enumerate(shapes):
            images = pixels(*shape, seed).cuda()
            out = extractor(images)
            assert extractor.network is not None
            eager = extractor.network(images, None, KEYS)
            assert all(torch.equal(out[key], eager[key]) for key in KEYS)
            returned.append(out)
        for seed, (shape, out) in enumerate(zip(shapes, returned, strict=True)):
            wanted = reference(pixels(*shape, seed))
            assert max(error(out[key], wanted[key]) for key in KEYS) < most


def test_moved_weights_are_not_replayed_from_where_they_were(tiny_weights: Path) -> None:
    extractor = DETRExtractor(str(tiny_weights)).cuda()
    images = pixels(1, 96, 128, 0).cuda()
    with torch.inference_mode():
        first = [extractor(images) for _ in range(3)]
        assert extractor.network is not None
        extractor.network.half()
        assert extractor(images)["query_embeddings"].dtype is torch.float16
        extractor.network.float()
        again = extractor(images)
    assert error(again["query_embeddings"], first[-1]["query_embeddings"]) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_convolutions_go_through_cudnn(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        assert cudnn.usable(torch.zeros(1, dtype=dtype, device="cuda"))


def test_the_whole_job(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    """Through the command: copied beside the model, replayed, written; float32 as on the CPU."""
    from detr_lightning.command.main import main

    stores: list[Any] = []
    for device in ("cpu", "gpu"):
        argv = ["predict", *map(str, coco_folder.data), "--model.weights", str(tiny_weights), "--data.batch_size", "1"]
        argv += ["--trainer.accelerator", device, "--output_dir", str(tmp_path / device)]
        assert main([*argv, "--extract_type", "all"]) == 0
        stores.append(EmbeddingStore(tmp_path / device))
    on_cpu, on_gpu = stores
    assert list(on_cpu) == list(on_gpu)
    for image_id in on_cpu:
        assert max(error(on_gpu[image_id][key], on_cpu[image_id][key]) for key in on_cpu[image_id]) < 2e-5


def test_a_batch_is_pinned_and_moved(coco_folder: Coco) -> None:
    from lightning.pytorch import Trainer

    data = COCODataModule(str(coco_folder.images), short_side=64, long_side=128, num_workers=1)
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    data.trainer = trainer
    data.setup()
    batch = next(iter(data.predict_dataloader()))
    assert batch["pixels"].is_pinned()
    assert data.transfer_batch_to_device(batch, torch.device("cuda"), 0)["pixels"].is_cuda
