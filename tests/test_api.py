"""One call from Python: what it takes, that its numbers are the command's, and what it says of bad input."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_factory import Coco, make_coco
from lightning.pytorch import Trainer
from PIL import Image
from ran import RunCLI

from detr_lightning import DETRExtractor, EmbeddingStore, extract
from detr_lightning.analysis.objects import objects
from detr_lightning.api import in_python
from detr_lightning.errors import DETRLightningWarning, SettingTypeError, UnreadableImageError

SMALL = {"short_side": 64, "long_side": 128, "num_workers": 0}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def written(coco_folder: Coco, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """The eight images, written by one call."""
    folder = tmp_path_factory.mktemp("written") / "out"
    store = extract(
        coco_folder.images, coco_folder.annotations, weights=tiny_weights, output_dir=folder, progress=False, **SMALL
    )
    return store


def read(images: Any, weights: Path, **settings: Any) -> EmbeddingStore:
    """Extract into memory."""
    store = extract(images, weights=weights, progress=False, **SMALL | settings)
    assert store.folder is None
    return store


def assert_close(tensors: Tensors, expected: Tensors) -> None:
    assert list(tensors) == list(expected)
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype
        assert float((tensor - expected[key]).norm() / expected[key].norm()) < 1e-5


def test_the_numbers_are_the_commands(
    coco_folder: Coco, run_cli: RunCLI, tmp_path: Path, written: EmbeddingStore
) -> None:
    assert run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out").code == 0
    assert len(list(written.folder.iterdir())) == 9
    for image_id in written:
        path = tmp_path / "out" / f"embedding_{image_id:012d}.pt"
        assert path.read_bytes() == written.path(image_id).read_bytes()
    ours, theirs = (json.loads((folder / "metadata.json").read_text()) for folder in (written.folder, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"config", "checksum"}:
        assert ours[key] == theirs[key], key
    assert written.image_path(4) == coco_folder.images / "000000000004.jpg"


def test_a_coco_pair_and_a_folder_give_tensors_by_image_id(
    coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore
) -> None:
    for annotation_file in (coco_folder.annotations, None):  # File names that are numbers are the ids.
        found = read(coco_folder.images, tiny_weights, annotation_file=annotation_file)
        assert list(found) == written.image_ids
        for image_id, tensors in found.items():
            assert_close(tensors, written[image_id])


def test_a_path_an_image_and_a_list_of_both(coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore) -> None:
    first, second = (coco_folder.images / f"{image_id:012d}.jpg" for image_id in (1, 4))
    with Image.open(second) as image:
        for images, expected in (
            (first, [1]),
            (str(first), [1]),
            (image, [4]),
            ([first, image, str(second)], [1, 4, 4]),
            (iter((image, first)), [4, 1]),
        ):
            found = read(images, tiny_weights)
            assert list(found) == list(range(1, len(expected) + 1))
            for tensors, image_id in zip(found.values(), expected, strict=True):
                assert_close(tensors, written[image_id])


def test_workers_read_images_in_memory_too(coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore) -> None:
    paths = sorted(coco_folder.images.iterdir())[:3]
    images = [Image.open(path) for path in paths]  # Not decoded yet.
    found = read([*images, *images], tiny_weights, num_workers=2, batch_size=1)
    for image in images:
        image.close()
    for number, image_id in enumerate([1, 4, 7, 1, 4, 7], start=1):
        assert_close(found[number], written[image_id])


def test_settings_reach_the_model_and_the_data(coco_folder: Coco, tiny_weights: Path) -> None:
    keys = ["pred_boxes", "cross_attention", "query_embeddings"]
    found = read(coco_folder.images, tiny_weights, keys=keys, dtype="float16", limit=2, batch_size=1)
    assert list(found) == [1, 4]
    assert list(found[1]) == keys
    assert [tensor.dtype for tensor in found[1].values()] == [torch.float32, torch.float16, torch.float16]
    assert list(read(coco_folder.images, tiny_weights, extract_type="encoder", limit=1)[1]) == [
        "encoder_output",
        "pred_logits",
        "pred_boxes",
    ]
    with pytest.raises(ValueError, match="nheads"):  # The checkpoint says 4.
        read(coco_folder.images, tiny_weights, model={"nheads": 8})
    with pytest.raises(ValueError, match="extract_type"):
        read(coco_folder.images, tiny_weights, extract_type="decoders")
    with pytest.raises(TypeError, match=r"'batchsize'\. Did you mean 'batch_size'"):
        read(coco_folder.images, tiny_weights, batchsize=2)
    with pytest.raises(TypeError, match=r"'device'\. It has .*accelerator"):
        read(coco_folder.images, tiny_weights, device="cpu")
    for name in ("image_dir", "data"):
        with pytest.raises(TypeError, match=f"no setting '{name}'"):
            read(coco_folder.images, tiny_weights, **{name: "photos"})
    with pytest.raises(ValueError, match=r"must be a list, such as \[query_embeddings\]"):
        read(coco_folder.images, tiny_weights, keys="query_embeddings")


@pytest.mark.parametrize(
    "image_ids", [range(1, 5, 3), {1, 4}, (1, "000000000004.jpg"), np.array([1, 4]), [np.int64(1), 4]]
)
def test_ids_in_any_collection(coco_folder: Coco, tiny_weights: Path, image_ids: Any) -> None:
    found = read(coco_folder.images, tiny_weights, image_ids=image_ids, keys=["pred_boxes"])
    assert list(found) == [1, 4]


def test_unknown_ids_and_other_types(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("4\n")
    assert list(read(coco_folder.images, tiny_weights, image_ids=tmp_path / "ids.txt")) == [4]
    with pytest.raises(ValueError, match="image_ids names 1 id that no image has: 99"):
        read(coco_folder.images, tiny_weights, image_ids=[np.int64(1), np.int64(99)])
    for image_ids, found in (([1.5], "float"), (1, "int"), ([None], "NoneType")):
        with pytest.raises(SettingTypeError, match=rf"^image_ids: .*{found}.* Give a list of ids and file names"):
            read(coco_folder.images, tiny_weights, image_ids=image_ids)


def test_weights_may_be_a_path(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    model = DETRExtractor(tiny_weights, keys=["pred_boxes"])
    store = extract(coco_folder.images, model=model, output_dir=tmp_path / "out", limit=1, progress=False, **SMALL)
    assert store.metadata["config"]["model"]["weights"] == str(tiny_weights)


def test_settings_of_the_writer(coco_folder: Coco, tiny_weights: Path, tmp_path: Path, written: EmbeddingStore) -> None:
    scores = written.stack("pred_logits")[1].softmax(-1)[..., :-1].amax(-1)  # [8, 10]
    settings = dict(weights=tiny_weights, keys=["query_embeddings"], limit=2, progress=False, **SMALL)
    kept = {"min_score": scores[:2].median().item()}
    store = extract(coco_folder.images, output_dir=tmp_path / "out", writer=kept, **settings)
    assert store.metadata["min_score"] == kept["min_score"]
    rows = store.rows("query_embeddings")
    assert 0 < len(rows.queries) < 20
    for image_id, seen in zip(store.image_ids, scores[:2] >= kept["min_score"], strict=True):
        assert rows.queries[rows.image_ids == image_id].tolist() == seen.nonzero()[:, 0].tolist()
    for message, writer in (
        (r'writer=\{"min_score": ...\} is 2', {"min_score": 2}),
        (r"'min_scor'\. Did you mean 'min_score'", {"min_scor": 0.5}),
        (r"'dtype'\. Give it to extract itself", {"dtype": "float16"}),
        (r'writer=\{"min_score": ...\} was .*, now None', {}),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            extract(coco_folder.images, output_dir=tmp_path / "out", writer=writer, **settings)
    with pytest.raises(ValueError, match="Set output_dir"):
        extract(coco_folder.images, writer=kept, **settings)
    with pytest.raises(TypeError, match=r'no setting \'layout\'\. Give it as writer=\{"layout": ...\}'):
        extract(coco_folder.images, output_dir=tmp_path / "out", layout="lance", **settings)
    pytest.importorskip("lance")
    table = extract(coco_folder.images, output_dir=tmp_path / "table", writer={**kept, "layout": "lance"}, **settings)
    assert table.is_table
    assert table[1]["query_embeddings"].equal(store[1]["query_embeddings"])


def test_a_probe_can_be_trained_on_what_is_returned(coco_folder: Coco, tiny_weights: Path) -> None:
    found = read(coco_folder.images, tiny_weights)
    for tensors in found.values():
        for tensor in tensors.values():
            assert not tensor.is_inference()
            assert not tensor.requires_grad
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # A batch does not live on in one image.
    vectors = torch.stack([tensors["query_embeddings"].mean(0) for tensors in found.values()])
    probe = torch.nn.Linear(vectors.shape[1], 2)
    torch.nn.functional.cross_entropy(probe(vectors), torch.arange(8) % 2).backward()
    assert probe.weight.grad is not None
    assert probe.weight.grad.abs().sum() > 0
    vectors.requires_grad_().square().sum().backward()


def test_a_second_call_returns_at_once(
    coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.folder.iterdir()}

    def predict(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to do")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "predict", predict)
        settings = dict(weights=tiny_weights, output_dir=written.folder, progress=False, **SMALL)
        again = extract(coco_folder.images, coco_folder.annotations, **settings)
    assert again.metadata == written.metadata
    assert {path: path.stat().st_mtime_ns for path in written.folder.iterdir()} == before
    with pytest.raises(ValueError, match="float32"):
        extract(coco_folder.images, coco_folder.annotations, dtype="float16", **settings)
    with pytest.raises(FileExistsError):
        extract(coco_folder.images, coco_folder.annotations, if_exists="error", **settings)


def test_ctrl_c_leaves_the_callers_program_alone(
    coco_folder: Coco, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: EmbeddingStore
) -> None:
    settings = dict(weights=tiny_weights, output_dir=tmp_path / "out", batch_size=1, progress=False, **SMALL)
    handler = signal.getsignal(signal.SIGINT)
    predict_step = DETRExtractor.predict_step

    def interrupted(self: DETRExtractor, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if batch_idx == 3:
            raise KeyboardInterrupt
        return predict_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DETRExtractor, "predict_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(coco_folder.images, coco_folder.annotations, **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    store = extract(coco_folder.images, coco_folder.annotations, **settings)
    assert store.image_ids == written.image_ids


def test_another_image_in_memory_is_not_taken_for_the_first(tiny_weights: Path, tmp_path: Path) -> None:
    black, white = (Image.new("RGB", (64, 64), color) for color in ("black", "white"))
    settings = dict(weights=tiny_weights, output_dir=tmp_path / "out", progress=False, **SMALL)
    store = extract([black], **settings)
    assert store.entry(1).file_name.startswith("image 1 (")
    assert len(extract([black, white], **settings)) == 2
    with pytest.raises(ValueError, match="image 1"):
        extract([white], **settings)
    assert_close(extract([white], if_exists="overwrite", **settings)[1], read(white, tiny_weights)[1])


def test_the_same_pixels_turned_are_another_image(tiny_weights: Path, tmp_path: Path) -> None:
    images = [Image.new("RGB", (64, 64)) for _ in range(2)]
    images[1].getexif()[0x0112] = 3
    settings = dict(weights=tiny_weights, output_dir=tmp_path / "out", exif="apply", progress=False, **SMALL)
    extract(images[0], **settings)
    with pytest.raises(ValueError, match=r"image 1 .* with orientation None, but now has 3"):
        extract(images[1], **settings)
    settings |= {"output_dir": tmp_path / "stored", "exif": "ignore"}
    extract(images[0], **settings)
    with pytest.warns(DETRLightningWarning, match="1 of 1 image have an EXIF tag"):
        extract(images[1], **settings)


def test_relative_paths_are_of_the_folder_they_were_given_in(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(weights=tiny_weights, output_dir=tmp_path / "out", progress=False, **SMALL)
    for color in ("black", "white"):
        (tmp_path / color).mkdir()
        Image.new("RGB", (64, 64), color).save(tmp_path / color / "a.png")
    monkeypatch.chdir(tmp_path / "black")
    store = extract(["a.png"], **settings)
    assert store.entry(1).file_name == str(tmp_path / "black" / "a.png")
    monkeypatch.chdir(tmp_path / "white")
    with pytest.raises(ValueError, match=r"file_name .*black/a\.png, but now has .*white/a\.png"):
        extract(["a.png"], **settings)
    assert extract([tmp_path / "black" / "a.png"], **settings).metadata == store.metadata
    path = tmp_path / "out" / "metadata.json"
    path.write_text(path.read_text().replace(str(tmp_path / "black" / "a.png"), "a.png"))  # as once recorded
    monkeypatch.chdir(tmp_path / "black")
    assert extract(["a.png"], **settings).entry(1).file_name == "a.png"


def test_a_home_folder_is_found(
    coco_folder: Coco, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    os.symlink(coco_folder.images, tmp_path / "pictures")
    store = extract("~/pictures", weights=tiny_weights, output_dir="~/out", limit=1, progress=False, **SMALL)
    assert store.folder == tmp_path / "out"
    assert list(read(["~/pictures/000000000001.jpg"], tiny_weights)) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"nhead": 8}}, r"model has no setting 'nhead'\. Did you mean 'nheads'\?"),
        ({"model": {"weights": "random"}}, r"model has no setting 'weights'\. Give it to extract itself\."),
        ({"model": {"threads": 1}}, r"model has no setting 'threads'\. Give it as writer=\{\"threads\": \.\.\.\}\."),
        ({"model": 3}, r"model is 3, but must be a dict of settings: nheads, "),
        ({"nheads": 8}, r"extract has no setting 'nheads'\. Give it as model=\{\"nheads\": \.\.\.\}\."),
        ({"writer": "lance"}, r"writer is 'lance', but must be a dict of settings: threads, "),
    ],
)
def test_settings_that_do_not_exist(
    coco_folder: Coco, tiny_weights: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingTypeError, match=message):
        read(coco_folder.images, tiny_weights, **settings)


def test_what_is_not_there(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    image = next(coco_folder.images.iterdir())
    with pytest.raises(FileNotFoundError, match=r"images: .*none\.jpg does not exist"):
        read(tmp_path / "none.jpg", tiny_weights)
    with pytest.raises(FileNotFoundError, match=r"number 2, .*none\.jpg, is not a file"):
        read([image, tmp_path / "none.jpg"], tiny_weights, on_error="skip")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read(coco_folder.images, tiny_weights, annotation_file=tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read(image, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="list is empty"):
        read([], tiny_weights)
    with pytest.raises(ValueError, match="needs a folder"):
        read([image], tiny_weights, annotation_file=coco_folder.annotations)
    with pytest.raises(TypeError, match=r"number 1 is of type ndarray.*fromarray"):
        read([np.zeros((64, 64, 3), np.uint8)], tiny_weights)


def test_unreadable_images_stop_or_are_skipped(tiny_weights: Path, tmp_path: Path) -> None:
    coco = make_coco(tmp_path / "coco", 3)
    header, body = (coco.images / f"{image_id:012d}.jpg" for image_id in (1, 4))
    header.write_bytes(b"no image")
    body.write_bytes(body.read_bytes()[:2000])
    with Image.open(io.BytesIO(body.read_bytes())) as truncated:
        sources = [header, coco.images / "000000000007.jpg", body, truncated]
        for bad in (header, body):
            with pytest.raises(UnreadableImageError, match=rf"{bad.name}.*on_error='skip'"):
                read([bad], tiny_weights)
        with pytest.raises(UnreadableImageError, match=r"image 1.*cannot be decoded.*on_error='skip'"):
            read(truncated, tiny_weights)
        with pytest.warns(
            UserWarning, match=rf"3 images could not be read: '.*{header.name}', '.*{body.name}', 'image 4"
        ):
            assert list(read(sources, tiny_weights, on_error="skip")) == [2]
        settings = dict(weights=tiny_weights, output_dir=tmp_path / "out", on_error="skip", progress=False, **SMALL)
        with pytest.warns(UserWarning, match="3 images could not be read"):
            store = extract(sources, **settings)
        with pytest.warns(UserWarning, match=rf"1 image could not be read: '.*{header.name}'\.$"):
            extract(sources[:2], **settings | {"output_dir": tmp_path / "few"})
        with pytest.warns(UserWarning, match=rf"1 image could not be read: '.*{header.name}'\.$"):
            extract(sources[:2], **settings | {"output_dir": tmp_path / "few"})  # nothing is left to do
    assert store.image_ids == [2]
    assert [failed["id"] for failed in store.metadata["failed"]] == [1, 3, 4]
    with pytest.raises(UnreadableImageError, match=header.name):
        read(coco.images, tiny_weights, annotation_file=coco.annotations)
    with pytest.warns(UserWarning, match="2 images could not be read"):
        assert list(read(coco.images, tiny_weights, annotation_file=coco.annotations, on_error="skip")) == [7]


def test_a_script_runs_once_and_says_little(coco_folder: Coco, tiny_weights: Path, tmp_path: Path) -> None:
    """Without `if __name__ == "__main__"`, and with the workers and the progress that are there by default."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('begins')\n"
        "from detr_lightning import extract\n"
        f"found = extract({str(coco_folder.images)!r}, weights={str(tiny_weights)!r}, short_side=64, long_side=128)\n"
        "print(len(found), 'images')\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "begins\n8 images\n"
    assert done.stderr == "Extracting: 8 images to go\n"
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_store_in_memory_is_like_one_on_disk(
    coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "my_job"}.items():
        monkeypatch.setenv(name, value)  # as an allocation of a cluster leaves them
    store = read(coco_folder.images, tiny_weights, annotation_file=coco_folder.annotations)
    assert isinstance(store, Mapping)
    assert repr(store).startswith("EmbeddingStore('memory': 8 images, decoder_output")
    assert dict(store.items()).keys() == set(written)
    assert store.get(10**9) is None
    for key in written.metadata.keys() - {"config", "images", "checksum"}:
        assert store.metadata[key] == written.metadata[key], key
    for image_id in written:
        ours, theirs = store.entry(image_id), written.entry(image_id)
        assert (ours.file_name, ours.size, ours.features) == (theirs.file_name, theirs.size, theirs.features)
        assert_close(store[image_id], written[image_id])
    ids, vectors = store.stack("query_embeddings", pool="mean")
    expected = written.stack("query_embeddings", pool="mean")
    assert ids == expected[0]
    assert torch.allclose(vectors, expected[1], atol=1e-5)
    assert store.feature_map(1).shape == written.feature_map(1).shape
    assert len(store.dataset("pred_boxes")) == 8
    assert len(objects(store, 0.0)) == len(objects(written, 0.0)) > 0
    assert store.image_path(4) == written.image_path(4)


def test_a_model_that_is_loaded_once(coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore) -> None:
    model = DETRExtractor(str(tiny_weights), keys=["query_embeddings"])
    path = coco_folder.images / "000000000004.jpg"
    for images in (path, [path]):
        store = model.extract(images, progress=False, **SMALL)
        assert store.embedding_keys == ("query_embeddings",)
        assert torch.allclose(store[1]["query_embeddings"], written[4]["query_embeddings"], atol=1e-5)


def test_messages_speak_of_the_arguments_of_extract(
    coco_folder: Coco, tiny_weights: Path, written: EmbeddingStore
) -> None:
    for settings, said in (
        ({"dtype": "float8"}, "^dtype is 'float8'"),
        ({"batch_size": 0}, "^batch_size is 0"),
        ({"keys": ["pred_boxs"]}, "^keys is"),
        ({"model": {"nheads": 8}}, r'^model=\{"nheads": ...\} is'),
        ({"accelerator": "cpu", "precision": "16-mixed"}, "^precision 16-mixed needs a GPU"),
    ):
        with pytest.raises(ValueError, match=said):
            read(coco_folder.images, tiny_weights, **settings)
    with pytest.raises(ValueError, match=r"""output_dir s3://out is a URL, but writer=\{"layout": "files"\} needs"""):
        read(coco_folder.images, tiny_weights, output_dir="s3://out")
    pytest.importorskip("lance")
    with pytest.raises(ValueError, match=r"""another output_dir for writer=\{"layout": "lance"\}, or turn"""):
        read(coco_folder.images, tiny_weights, output_dir=written.folder, writer={"layout": "lance"})
    assert in_python("/photos/data.limit/model.pth: raise data.limit") == "/photos/data.limit/model.pth: raise limit"
    assert in_python("Store it with writer.dtype=float32.") == "Store it with dtype='float32'."
    assert in_python("Use writer.layout=lance.") == """Use writer={"layout": "lance"}."""
