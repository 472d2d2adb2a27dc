"""The protocol that the command and `extract()` share, and how ranks agree in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco
from lightning.pytorch import Trainer
from PIL import Image

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingWriter, extract
from detr_lightning.system import allow_tf32, quiet_lightning, restore_settings

SMALL = {"short_side": 64, "long_side": 128, "num_workers": 0}


def trainer(*callbacks: Any) -> Trainer:
    settings: Any = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **settings)


def test_a_data_module_used_again_serves_all_images(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    settings: Any = {"weights": tiny_weights, "output_dir": tmp_path / "out", "progress": False} | SMALL
    extract(coco_folder.images, coco_folder.annotations, limit=3, **settings)
    data = COCODataModule(str(coco_folder.images), str(coco_folder.annotations), batch_size=1, **SMALL)
    model = DETRExtractor(str(tiny_weights))
    with quiet_lightning():
        trainer(EmbeddingWriter(str(tmp_path / "out"))).predict(model, data)
        batches = trainer().predict(model, data)
    assert batches is not None
    assert len(list((tmp_path / "out").glob("*.pt"))) == len(batches) == 8


def test_a_run_leaves_the_process_as_it_was(coco_folder: Coco, tiny_weights: Path) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, Image.MAX_IMAGE_PIXELS
    filters = list(warnings.filters)
    with restore_settings():
        allow_tf32(True)
        settings: Any = {"limit": 1, "max_image_pixels": 10**6, "progress": False} | SMALL
        extract(coco_folder.images, weights=tiny_weights, **settings)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        assert before[2] == Image.MAX_IMAGE_PIXELS
        with pytest.raises(ValueError, match="more than 100 pixels"):
            extract(coco_folder.images, weights=tiny_weights, **settings | {"max_image_pixels": 100})
        assert before[2] == Image.MAX_IMAGE_PIXELS
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, Image.MAX_IMAGE_PIXELS
    assert after == before
    assert [entry for entry in filters if entry not in warnings.filters] == []


def test_half_precision_on_a_cpu_is_refused_in_python_too(coco_folder: Coco, tiny_weights: Path) -> None:
    for precision in ("16-mixed", "16-true"):
        with pytest.raises(ValueError, match="needs a GPU"):
            extract(coco_folder.images, weights=tiny_weights, precision=precision, accelerator="cpu", progress=False)


def test_a_download_comes_before_the_folder_is_looked_for(
    coco_folder: Coco, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: COCODataModule) -> None:
        if not (tmp_path / "val2017").exists():  # The Trainer asks again.
            (tmp_path / "val2017").symlink_to(coco_folder.images)

    monkeypatch.setattr(COCODataModule, "prepare_data", download)
    found = extract(tmp_path / "val2017", weights=tiny_weights, download=True, limit=2, progress=False, **SMALL)
    assert list(found) == [1, 4]
