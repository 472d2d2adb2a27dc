"""The main job through the command line: what lands on disk, and that it does not depend on how it was computed."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_factory import Coco, make_coco
from lightning.pytorch import Callback, Trainer
from places import SHARED
from ran import RunCLI

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingStore, EmbeddingWriter
from detr_lightning.format.keys import EXTRACT_TYPES, KEYS, FeatureSizes, ModelShape, nbytes, shape_of
from detr_lightning.model.detr import Architecture
from detr_lightning.store.verify import verify
from detr_lightning.system import quiet_lightning


def read(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {int(path.stem[-12:]): torch.load(path) for path in sorted(folder.glob("embedding_*.pt"))}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def worst(a: dict[int, dict[str, torch.Tensor]], b: dict[int, dict[str, torch.Tensor]]) -> float:
    assert a.keys() == b.keys()
    assert all(a[i].keys() == b[i].keys() for i in a)
    return max(error(a[i][key], b[i][key]) for i in a for key in a[i])


@pytest.fixture(scope="module")
def reference(coco_folder: Coco, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tensor there is, one image at a time."""
    from detr_lightning.command.main import main

    folder = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cli.py"])
        argv = ["predict", *coco_folder.data, "--model.weights", str(tiny_weights), "--output_dir", str(folder)]
        assert main([*argv, "--data.batch_size", "1", "--model.keys", f"[{','.join(KEYS)}]"]) == 0
    return folder


@pytest.mark.parametrize("extract_type", EXTRACT_TYPES)
def test_what_lands_on_disk(
    extract_type: str, run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path
) -> None:
    out = tmp_path / "out"
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out, "--extract_type", extract_type)
    assert ran.code == 0, ran.err
    metadata = json.loads((out / "metadata.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "metadata.json",
        *(f"embedding_{image_id:012d}.pt" for image_id in metadata["image_ids"]),
    }
    assert list(metadata)[:4] == ["image_ids", "num_images", "extract_type", "embedding_keys"]
    assert metadata["image_ids"] == [1, 4, 7, 10, 13, 16, 19, 22]
    assert metadata["num_images"] == 8
    assert metadata["extract_type"] == extract_type
    assert metadata["embedding_keys"] == list(EXTRACT_TYPES[extract_type])
    assert metadata["categories"] == {"1": "person", "90": "toothbrush"}

    shape = ModelShape.of_architecture(metadata["model"]["architecture"])
    expected = read(reference)
    for image in metadata["images"]:
        path = out / f"embedding_{image['id']:012d}.pt"
        tensors = torch.load(path)
        features = FeatureSizes.single(image["feature_size"])
        assert path.stat().st_size == image["bytes"]
        assert type(tensors) is dict
        assert list(tensors) == metadata["embedding_keys"]
        for key, tensor in tensors.items():
            assert tensor.shape == shape_of(key, shape, features)
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert error(tensor, expected[image["id"]][key]) < 1e-5
        if extract_type in ("all", "decoder"):
            assert torch.equal(tensors["decoder_output"][-1], tensors["query_embeddings"])
        content = nbytes(tensors, shape, features, "float32")
        assert content < image["bytes"] < content + 4096


def test_the_code_that_users_write(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("predict", *coco_folder.data).code == 0

    emb = torch.load("embeddings_output/embedding_000000000001.pt")
    assert emb["query_embeddings"].shape == (10, 32)
    person = emb["pred_logits"].softmax(-1)[:, 1]
    assert person.shape == (10,)
    with open("embeddings_output/metadata.json") as file:
        metadata = json.load(file)
    for image_id in metadata["image_ids"][:10]:
        torch.load(f"embeddings_output/embedding_{image_id:012d}.pt")
    files = sorted(Path("embeddings_output").glob("embedding_*.pt"))
    vectors = np.stack([torch.load(f)["query_embeddings"].numpy() for f in files]).mean(axis=1)
    assert vectors.shape == (8, 32)


def test_sizes_are_those_promised_for_the_official_model() -> None:
    shape, features = Architecture().shape, FeatureSizes.single(Architecture().feature_size((800, 1066)))
    megabytes = {name: nbytes(keys, shape, features, "float32") / 1e6 for name, keys in EXTRACT_TYPES.items()}
    assert megabytes == pytest.approx({"decoder": 1.63, "all": 8.59, "encoder": 0.91, "backbone": 7.0}, rel=0.01)
    without_encoder = ("decoder_output", "query_embeddings", "pred_logits", "pred_boxes")
    assert nbytes(without_encoder, shape, features, "float16") / 1e3 == pytest.approx(397, rel=0.01)


def test_explicit_keys_are_stored_in_their_order(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    keys = ["pred_boxes", "cross_attention", "query_embeddings"]
    argv = ("--output_dir", tmp_path / "out", "--model.keys", f"[{','.join(keys)}]", "--data.limit", "2")
    assert run_cli("predict", *coco_folder.data, *argv).code == 0
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["embedding_keys"] == keys
    assert metadata["extract_type"] == "decoder"
    assert metadata["image_ids"] == [1, 4]
    tensors = torch.load(tmp_path / "out" / "embedding_000000000001.pt")
    assert list(tensors) == keys
    assert tensors["cross_attention"].sum(-1) == pytest.approx(torch.ones(2, 10))


def test_float16_leaves_logits_and_boxes_as_they_are(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path
) -> None:
    assert (
        run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out", "--writer.dtype", "float16").code == 0
    )
    expected = read(reference)
    for image_id, tensors in read(tmp_path / "out").items():
        for key, tensor in tensors.items():
            half = key not in ("pred_logits", "pred_boxes")
            assert tensor.dtype == (torch.float16 if half else torch.float32)
            assert error(tensor, expected[image_id][key]) < (5e-4 if half else 1e-5)


@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_no_image_depends_on_its_batch(
    batch_size: int, run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path
) -> None:
    argv = ("--output_dir", tmp_path / "out", "--data.batch_size", batch_size, "--model.keys", f"[{','.join(KEYS)}]")
    assert run_cli("predict", *coco_folder.data, *argv).code == 0
    assert worst(read(tmp_path / "out"), read(reference)) == 0


def test_no_image_depends_on_which_others_are_there(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path
) -> None:
    argv = ("--output_dir", tmp_path / "out", "--data.image_ids", "[22,7,4]", "--model.keys", f"[{','.join(KEYS)}]")
    assert run_cli("predict", *coco_folder.data, *argv).code == 0
    expected = read(reference)
    assert worst(read(tmp_path / "out"), {image_id: expected[image_id] for image_id in (4, 7, 22)}) == 0


def test_padded_batches_do_change_results_and_are_cropped(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path
) -> None:
    argv = ("--output_dir", tmp_path / "out", "--data.batching", "padded", "--data.batch_size", "4")
    assert run_cli("predict", *coco_folder.data, *argv, "--extract_type", "all").code == 0
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["batching"] == "padded, 4"
    expected, changed = read(reference), []
    for image in metadata["images"]:
        tensors = torch.load(tmp_path / "out" / f"embedding_{image['id']:012d}.pt")
        height, width = image["feature_size"]
        assert tensors["encoder_output"].shape == (height * width, 32)
        assert tensors["backbone_features"].shape == (512, height, width)
        changed.append(error(tensors["query_embeddings"], expected[image["id"]]["query_embeddings"]))
    assert max(changed) > 1e-3


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_is_close(
    precision: str, run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path
) -> None:
    argv = ("--output_dir", tmp_path / "out", "--trainer.precision", precision, "--allow_slow_precision")
    assert run_cli("predict", *coco_folder.data, *argv).code == 0
    expected = read(reference)
    for image_id, tensors in read(tmp_path / "out").items():
        a, b = (t["query_embeddings"] for t in (tensors, expected[image_id]))
        assert a.dtype == torch.float32
        assert torch.cosine_similarity(a, b).min() > 0.99
        assert not torch.equal(a, b)


@pytest.mark.endurance
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")  # torch's advice
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_model_gives_the_same(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, reference: Path) -> None:
    keys = EXTRACT_TYPES["all"]
    argv = ("--output_dir", tmp_path / "out", "--model.compile", "true", "--model.keys", f"[{','.join(keys)}]")
    ran = run_cli("predict", *coco_folder.data, *argv, "--data.image_ids", "[1,4,13]")
    assert ran.code == 0, ran.err
    expected = read(reference)
    found = read(tmp_path / "out")
    assert worst(found, {i: {key: expected[i][key] for key in keys} for i in (1, 4, 13)}) < 1e-5


def test_the_same_file_has_the_same_bytes_in_two_runs(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / name).code == 0
    for path in (tmp_path / "a").glob("*.pt"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert zipfile.ZipFile(io.BytesIO(path.read_bytes())).testzip() is None


def test_a_folder_without_annotations(run_cli: RunCLI, tmp_path: Path) -> None:
    images = make_coco(tmp_path, 3).images
    (images / "sub").mkdir()
    for number, path in enumerate(sorted(images.glob("*.jpg"))):
        path.rename(images / ("sub" if number else ".") / f"picture {number}.jpg")
    small = ("--data.short_side", "64", "--data.long_side", "128", "--data.num_workers", "1")
    ran = run_cli("predict", "--data.image_dir", images, *small, "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    names = [(image["id"], image["file_name"]) for image in metadata["images"]]
    assert names == [(1, "picture 0.jpg"), (2, "sub/picture 1.jpg"), (3, "sub/picture 2.jpg")]


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "golden").is_dir(), reason="../shared/golden, the official code's outputs, is not there"
)
def test_coco_images_agree_with_the_official_code(run_cli: RunCLI, tmp_path: Path) -> None:
    single = torch.load(SHARED / "golden" / "expected.pt")["single"]
    images = SHARED / "coco" / "val2017"
    others = sorted(path.name for path in images.iterdir())[:9]  # of many shapes, for batches of one and of several
    image_ids = sorted({int(Path(name).stem) for name in (*single, *others)})
    argv = (
        "--data.image_dir",
        images,
        "--data.annotation_file",
        SHARED / "coco" / "annotations" / "instances_val2017.json",
        "--data.image_ids",
        str(image_ids),
    )
    weights = SHARED / "golden" / "detr_r18_tiny.pth"
    ran = run_cli(
        "predict", *argv, "--model.weights", weights, "--output_dir", tmp_path / "out", "--extract_type", "all"
    )
    assert ran.code == 0, ran.err
    assert len(list((tmp_path / "out").iterdir())) == len(image_ids) + 1
    for name, expected in single.items():
        tensors = torch.load(tmp_path / "out" / f"embedding_{int(Path(name).stem):012d}.pt")
        for key, tensor in tensors.items():
            assert error(tensor, expected[key].reshape(tensor.shape)) < 1e-5, (name, key)


def test_a_padded_resume_leaves_finished_images_alone(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    """The last image of the first run shares a batch with a new one, and both layouts keep what they have."""
    padded = ("--data.batching", "padded", "--data.batch_size", "2")
    for layout in ("files", "lance"):
        command = ("predict", *coco_folder.data, *padded, "--writer.layout", layout, "--output_dir", tmp_path / layout)
        assert run_cli(*command, "--data.limit", "3").code == 0
        before = {image_id: EmbeddingStore(tmp_path / layout)[image_id] for image_id in (1, 4, 7)}
        if layout == "files":
            stats = {path.name: path.stat() for path in (tmp_path / layout).glob("*.pt")}
        ran = run_cli(*command, "--data.limit", "4")
        assert ran.code == 0, ran.err
        store = EmbeddingStore(tmp_path / layout)
        assert store.image_ids == [1, 4, 7, 10]
        for image_id, tensors in before.items():
            assert all(torch.equal(tensor, store[image_id][key]) for key, tensor in tensors.items())
        assert verify(tmp_path / layout) == []
    assert all((tmp_path / "files" / name).stat() == stat for name, stat in stats.items())


class Tripping(Callback):
    """Ends a run before its first batch."""

    def on_predict_batch_start(self, *_: Any) -> None:
        raise OSError("tripped")


def predict(model: DETRExtractor, data: COCODataModule, *callbacks: Callback) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with quiet_lightning():
        Trainer(accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet).predict(model, data)


def test_a_run_that_fails_leaves_the_model_as_it_was(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    model = DETRExtractor(str(tiny_weights), keys=["query_embeddings"])
    data = COCODataModule(str(coco_folder.images), short_side=64, long_side=128, batch_size=1, num_workers=0)
    with pytest.raises(OSError, match="tripped"):
        predict(model, data, EmbeddingWriter(str(tmp_path), min_score=0.1), Tripping())
    assert model.further_keys == ()


def test_a_data_module_forgets_the_folder_of_an_earlier_run(tiny_weights: Path, tmp_path: Path) -> None:
    """Ids of images without annotations are kept within an output folder, and are counted anew in another one."""
    images = make_coco(tmp_path / "made", 3).images
    folder = tmp_path / "images"
    folder.mkdir()
    made = sorted(images.iterdir())
    shutil.copy(made[0], folder / "b.jpg")
    model = DETRExtractor(str(tiny_weights), keys=["query_embeddings"])
    data = COCODataModule(str(folder), short_side=64, long_side=128, batch_size=1, num_workers=0)
    predict(model, data, EmbeddingWriter(str(tmp_path / "one")))
    shutil.copy(made[1], folder / "a.jpg")
    predict(model, data, EmbeddingWriter(str(tmp_path / "one")))
    assert [entry["file_name"] for entry in EmbeddingStore(tmp_path / "one").metadata["images"]] == ["b.jpg", "a.jpg"]
    predict(model, data, EmbeddingWriter(str(tmp_path / "two"), if_exists="overwrite"))
    assert [entry["file_name"] for entry in EmbeddingStore(tmp_path / "two").metadata["images"]] == ["a.jpg", "b.jpg"]


def test_two_writers_of_which_one_has_some_images(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    model = DETRExtractor(str(tiny_weights), keys=["query_embeddings"])

    def data(**settings: Any) -> COCODataModule:
        small = {"short_side": 64, "long_side": 128, "batch_size": 1, "num_workers": 0}
        return COCODataModule(str(coco_folder.images), str(coco_folder.annotations), **small, **settings)

    one, two = tmp_path / "one", tmp_path / "two"
    predict(model, data(limit=3), EmbeddingWriter(str(one)))
    before = {path.name: path.stat() for path in one.glob("*.pt")}
    predict(model, data(), EmbeddingWriter(str(one)), EmbeddingWriter(str(two), dtype="float16"))
    assert EmbeddingStore(one).image_ids == EmbeddingStore(two).image_ids
    assert all((one / name).stat() == stat for name, stat in before.items())


def test_a_damaged_file_of_an_image_that_is_not_planned_is_named(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path
) -> None:
    command = ("predict", *coco_folder.data, "--output_dir", tmp_path)
    assert run_cli(*command, "--data.limit", "3").code == 0
    path = tmp_path / "embedding_000000000007.pt"
    path.write_bytes(path.read_bytes()[:-10])
    ran = run_cli(*command, "--data.image_ids", "[1, 4, 10]")
    assert ran.code == 0
    assert "has 1 image that this run does not plan and whose file is missing or damaged" in ran.err
    assert "000000000007.jpg" in ran.err
    assert EmbeddingStore(tmp_path).image_ids == [1, 4, 10]
