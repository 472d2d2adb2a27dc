"""What is not trusted: checkpoints, annotation files and folders of images."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import SMALL, Coco, make_coco
from harness import message

Run = Callable[..., Any]


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def as_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def as_old_format(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [as_zip, as_old_format, as_pickle])
@pytest.mark.parametrize("place", ["alone", "beside weights", "in args"])
def test_a_checkpoint_never_runs_what_is_in_it(
    run_cli: Run, coco_folder: Coco, tiny_weights: Path, tmp_path: Path, write: Any, place: str
) -> None:
    bomb: Any = Malicious(tmp_path / "ran")
    weights = torch.load(tiny_weights)
    content = {"alone": bomb, "beside weights": {**weights, "optimizer": bomb}, "in args": {**weights, "args": bomb}}
    write(content[place], tmp_path / "bad.pth")
    out = tmp_path / "out"
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out, "--model.weights", tmp_path / "bad.pth")
    assert ran.code == 1
    assert "bad.pth" in message(ran.err)
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


def test_an_embedding_file_never_runs_what_is_in_it(tmp_path: Path) -> None:
    from disk import extract

    from detr_lightning.store import EmbeddingStore

    extract(tmp_path, [1])
    torch.save({"query_embeddings": Malicious(tmp_path / "ran")}, tmp_path / "embedding_000000000001.pt")
    with pytest.raises(Exception, match=r"embedding_000000000001|[Ww]eights"):
        EmbeddingStore(tmp_path)[1]
    assert not (tmp_path / "ran").exists()


def refused_with(run_cli: Run, folder: Path, **fields: Any) -> None:
    """Extract into `out` with an annotation file whose first image has these fields, which the command refuses."""
    coco = make_coco(folder / "coco", 2)
    content = json.loads(coco.annotations.read_text())
    content["images"][0] |= fields
    coco.annotations.write_text(json.dumps(content))
    ran = run_cli("predict", *coco.data, "--output_dir", folder / "out")
    assert ran.code == 1
    message(ran.err)


@pytest.mark.parametrize("file_name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..\\secret.jpg"])
def test_annotations_cannot_name_a_file_outside(run_cli: Run, tmp_path: Path, file_name: str) -> None:
    refused_with(run_cli, tmp_path, file_name=file_name)
    assert not list(tmp_path.glob("out/embedding_*"))


@pytest.mark.parametrize("image_id", ["../../x", -1, 10**12, 1.5, True, None])
def test_ids_cannot_name_a_file_elsewhere(run_cli: Run, tmp_path: Path, image_id: Any) -> None:
    refused_with(run_cli, tmp_path, id=image_id)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("annotated", [True, False])
def test_a_link_out_of_the_image_folder_is_not_followed(run_cli: Run, tmp_path: Path, annotated: bool) -> None:
    coco = make_coco(tmp_path / "coco", 2)
    victim = coco.images / "000000000001.jpg"
    victim.rename(tmp_path / "secret.jpg")
    victim.symlink_to(tmp_path / "secret.jpg")
    source = coco.data if annotated else ("--data.image_dir", coco.images, *SMALL)
    out = tmp_path / "out"
    ran = run_cli("predict", *source, "--output_dir", out)
    assert ran.code == 1
    assert "symbolic link leads out of the image folder" in message(ran.err)
    ran = run_cli("predict", *source, "--output_dir", out, "--data.on_error", "skip")
    assert ran.code == 0
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["image_ids"] == [4]
    assert "symbolic link" in metadata["failed"][0]["reason"]
