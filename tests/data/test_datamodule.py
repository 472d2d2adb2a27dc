"""The data module: which images it serves to whom, what it warns of, what it reads again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from coco_factory import Coco, make_coco
from lightning.pytorch import Trainer
from PIL import Image
from ran import RunCLI

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingWriter, extract
from detr_lightning.data.folder_images import FolderImages
from detr_lightning.data.sources import ListedImages
from detr_lightning.errors import DETRLightningWarning, SettingError
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.system import quiet_lightning

SMALL: dict[str, Any] = {"short_side": 64, "long_side": 128, "num_workers": 0}


def trainer(*callbacks: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=list(callbacks))


def ids(batches: Any) -> list[int]:
    return sorted(image_id for batch in batches for image_id in batch["image_id"])


def test_a_resumed_data_module_serves_all_images_to_a_trainer_without_a_writer(
    coco_folder: Coco, tiny_weights: Path, tmp_path: Path
) -> None:
    model = DETRExtractor(str(tiny_weights), keys=["query_embeddings"])
    data = COCODataModule(str(coco_folder.images), str(coco_folder.annotations), limit=3, **SMALL)
    writer = EmbeddingWriter(str(tmp_path / "out"))
    with quiet_lightning():
        for _ in range(2):
            trainer(writer).predict(model, data, return_predictions=False)
        assert ids(trainer().predict(model, data)) == [1, 4, 7]


def test_a_header_is_read_once_and_only_pending_images_are_decoded(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_image = Image.open

    def spy(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(getattr(file, "name", file)).name)
        return open_image(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", spy)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 64)).save(images / f"{number}.png")
    arguments = ("--data.image_dir", images, *("--data.short_side", "64", "--data.long_side", "128"))
    out = ("--data.num_workers", "0", "--output_dir", tmp_path / "out", "--model.keys", "[query_embeddings]")
    assert run_cli("predict", *arguments, *out).code == 0
    # Each once for its header and once for its pixels.
    assert sorted(opened) == ["0.png", "0.png", "1.png", "1.png", "2.png", "2.png"]
    opened.clear()
    Image.new("RGB", (80, 64)).save(images / "3.png")
    assert run_cli("predict", *arguments, *out).code == 0
    assert sorted(opened) == ["0.png", "1.png", "2.png", "3.png", "3.png"]
    opened.clear()
    assert run_cli("predict", *arguments, *out, "--data.limit", "2", "--writer.if_exists", "overwrite").code == 0
    assert sorted(opened) == ["0.png", "0.png", "1.png", "1.png"]  # Only those that were chosen.


def test_paths_are_stored_absolute(coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(coco_folder.images.parent)
    data = COCODataModule("images", "instances.json", **SMALL)
    monkeypatch.chdir(tmp_path)
    data.setup()
    assert len(data.records) == 8
    assert os.path.isabs(data.hparams["image_dir"])
    assert os.path.isabs(data.hparams["annotation_file"])


def test_images_that_are_left_out_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "1.png")
    for name in ("a.jxl", "b.jxl", "c.jfif", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.warns(DETRLightningWarning, match=r"unsupported extensions: 1 \.jfif, 2 \.jxl\. They are left out"):
        COCODataModule(str(tmp_path), **SMALL).setup()
    (tmp_path / "1.png").unlink()
    with pytest.raises(SettingError, match=r"it has 1 \.jfif, 2 \.jxl, 1 \.txt"):
        COCODataModule(str(tmp_path), **SMALL).setup()


def test_a_subset_from_a_file(coco_folder: Coco, tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("7\n000000000001.jpg\n")
    data = COCODataModule(str(coco_folder.images), str(coco_folder.annotations), image_ids=str(path), **SMALL)
    data.setup()
    assert [record.image_id for record in data.records] == [1, 7]


def test_sides_are_the_models_unless_they_are_given() -> None:
    class Model:
        preprocessing = Preprocessing(short_side=480, long_side=600)
        processor = None

    data = COCODataModule("")
    assert data.resize((400, 400)) == (800, 800)
    data.use_model(Model())
    assert data.resize((400, 400)) == (480, 480)
    assert data.preprocessing["short_side"] == 480
    data = COCODataModule("", short_side=320)
    data.use_model(Model())
    assert data.preprocessing["short_side"] == 320
    assert data.preprocessing["long_side"] == 600
    with pytest.raises(SettingError, match=r"data\.long_side \(600\) is less than data\.short_side \(700\)"):
        COCODataModule("", short_side=700).use_model(Model())
    Model.preprocessing = Preprocessing(short_side=None, long_side=None, height=640, width=640, processor="P")
    data = COCODataModule("")
    data.use_model(Model())
    assert data.resize((100, 300)) == (640, 640)
    with pytest.raises(SettingError, match=r"data\.long_side is set, but the model only takes images of 640x640"):
        COCODataModule("", long_side=900).use_model(Model())


def test_sources_may_be_anything(tiny_weights: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    data = COCODataModule.of(ListedImages([tmp_path / "a.png", Image.new("RGB", (40, 40))]), **SMALL)
    data.setup()
    assert [record.size for record in data.records] == [(64, 80), (40, 40)]
    assert data.records[0].file_name == str(tmp_path / "a.png")
    assert FolderImages(tmp_path).find()[0].file_name == "a.png"


def test_turned_images_of_a_folder_are_counted_before_the_run(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (80, 64)).save(tmp_path / "1.jpg", exif=exif)
    Image.new("RGB", (80, 64)).save(tmp_path / "2.jpg")
    with pytest.warns(DETRLightningWarning, match="1 of 2 images have an EXIF tag"):
        COCODataModule(str(tmp_path), **SMALL).setup()
    data = COCODataModule(str(tmp_path), exif="apply", **SMALL)
    data.setup()
    assert [record.size for record in data.records] == [(80, 64), (64, 80)]


def test_extract_turns_images(tiny_weights: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.open(make_coco(tmp_path, 1).images / "000000000001.jpg")
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.rotate(180).save(tmp_path / "plain.png")
    settings: dict[str, Any] = {"weights": tiny_weights, "keys": ["query_embeddings"], "progress": False, **SMALL}
    turned = extract(tmp_path / "turned.png", exif="apply", **settings)[1]["query_embeddings"]
    assert turned.equal(extract(tmp_path / "plain.png", **settings)[1]["query_embeddings"])
    picture.close()
