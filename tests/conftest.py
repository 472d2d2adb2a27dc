"""The tiny model and the few images that tests extract, and the ways in which they run the command."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from coco_factory import Coco, make_coco
from object_store import Bucket, s3_server
from ran import Ran, RunCLI

# Models this small are faster on one thread. With several, MKL may use fewer on a busy machine, and rounds otherwise.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DETR of a few layers, random but always the same, as a file in the official layout."""
    from detr_lightning.model.detr import DETR, Architecture

    architecture = Architecture(
        block="basic",
        blocks=(1, 1, 1, 1),
        hidden_dim=32,
        nheads=4,
        encoder_layers=2,
        decoder_layers=2,
        feedforward_dim=64,
        num_queries=10,
        num_logits=92,
    )
    generator = torch.Generator().manual_seed(0)
    state = DETR(architecture).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.dim() > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.uniform_(-0.2, 0.2, generator=generator)
            tensor.add_(name.endswith("weight"))
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"model": state, "args": {"nheads": 4, "dilation": False}}, path)
    return path


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Coco:
    """Eight images of six shapes. Not to be changed: copy it, or call `make_coco`."""
    return make_coco(tmp_path_factory.mktemp("coco"), 8)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket on an S3 server, which this process has the credentials for."""
    with s3_server() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture
def run_cli(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCLI:
    """Run the command in this process, with the tiny weights unless others are named."""
    from detr_lightning.command.main import main

    def run(*args: str | Path) -> Ran:
        words = [str(arg) for arg in args]
        if "--model.weights" not in words and words and words[0] in ("predict", "validate"):
            words += ["--model.weights", str(tiny_weights)]
        monkeypatch.setattr(sys, "argv", ["cli.py", *words])
        capsys.readouterr()
        try:
            code = main()
        finally:
            gc.collect()
            gc.freeze()  # what lives on, libraries above all, need not be looked through after each run
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
