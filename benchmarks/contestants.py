"""The contestants of a benchmark, each in its own process, so that settings, threads and memory stay apart.

A side is created once in its process. It has `forward()`, the model on one 800x1066 image, and `job(folder, output,
batch_size, ...)`, the whole job from files to files; both return seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import resource
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from peers import HuggingFace, Official, Peer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingWriter
from detr_lightning.format.keys import EXTRACT_TYPES
from detr_lightning.model.detr import DETR, normalise
from detr_lightning.system import quiet_lightning

PRECISIONS = {"float32": ("32-true", torch.float32), "bfloat16": ("bf16-true", torch.bfloat16)}
KEYS = EXTRACT_TYPES["decoder"]


def device() -> torch.device:
    """Return the device that the models run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(run: Callable[[], Any]) -> float:
    """Run a function; return the seconds it took."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pixels_of_one_image() -> Tensor:
    """Return random uint8 pixels, `[1, 3, 800, 1066]`, as our data module returns them."""
    pixels = torch.randint(0, 256, (1, 3, 800, 1066), dtype=torch.uint8)
    return pixels.contiguous(memory_format=torch.channels_last).to(device())


class TimedExtractor(DETRExtractor):
    """An extractor that adds up the seconds its model takes, on a CPU."""

    seconds = 0.0

    def forward(self, *batch: Any) -> dict[str, Tensor]:
        """Run the model."""
        start = time.perf_counter()
        tensors = super().forward(*batch)
        self.seconds += time.perf_counter() - start
        return tensors


class Ours:
    """This project, as its command runs it.

    Args:
        dtype: `float32` or `bfloat16`.
        settings: The settings of `DETRExtractor`.
    """

    def __init__(self, dtype: str, **settings: Any) -> None:
        self.precision, self.dtype = PRECISIONS[dtype]
        self.extractor = TimedExtractor(**{"weights": "random", **settings})
        self.pixels = pixels_of_one_image()

    def forward(self) -> float:
        """Run the model on uint8 pixels."""
        if self.extractor.network is None:
            self.extractor.setup()
            self.extractor.to(device(), self.dtype)
        with torch.inference_mode():
            return timed(lambda: self.extractor(self.pixels))

    def job(self, folder: Path, output: Path, batch_size: int | None = None, **settings: Any) -> float:
        """Extract a folder; return the seconds from the first batch to the metadata."""
        writer_settings = {
            key: settings.pop(key) for key in ("dtype", "threads", "layout", "min_score") if key in settings
        }
        clock = Clock()
        self.extractor.seconds = 0.0
        with quiet_lightning():
            # Callbacks end in order: the writer has written all when the clock stops.
            writer = EmbeddingWriter(str(output), **writer_settings)
            trainer = Trainer(
                devices=1,
                precision=self.precision,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                callbacks=[writer, clock],
            )
            images = COCODataModule(str(folder), batch_size=batch_size, **settings)
            trainer.predict(self.extractor, images, return_predictions=False)
        self.idle = 1 - self.extractor.seconds / clock.seconds
        return clock.seconds


class Clock(Callback):
    """A clock from a run's first batch to its metadata, so that start-up is left out."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.start


class Theirs:
    """A peer.

    Args:
        peer: The peer's class.
        dtype: `float32` or `bfloat16`.
        settings: The settings of that class.
    """

    def __init__(self, peer: type[Peer], dtype: str, **settings: Any) -> None:
        self.peer = peer(PRECISIONS[dtype][1], **settings)
        self.images = normalise(pixels_of_one_image()).contiguous()

    def forward(self) -> float:
        """Run the model on normalized images."""
        with torch.inference_mode():
            return timed(lambda: self.peer.forward(self.images))

    def job(self, folder: Path, output: Path, batch_size: int = 1) -> float:
        """Extract a folder."""
        output.mkdir()
        return timed(lambda: self.peer.job(sorted(folder.iterdir()), output, batch_size))


class Limit:
    """The machine's limit: an image's FLOPs at the best rate of one large matrix product or convolution.

    Args:
        dtype: `float32` or `bfloat16`.
    """

    def __init__(self, dtype: str) -> None:
        torch_dtype = PRECISIONS[dtype][1]

        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch_dtype, device=device())

        a = tensor(2048, 2048)
        x, w = (
            tensor(*shape).contiguous(memory_format=torch.channels_last)
            for shape in ((1, 256, 200, 266), (256, 256, 3, 3))
        )
        self.runs = [
            (lambda: a @ a, 2.0 * 2048**3),
            (lambda: torch.conv2d(x, w, padding=1), 2.0 * 200 * 266 * 256 * 256 * 9),
        ]
        self.flops = flops_of_one_image()

    def forward(self) -> float:
        """Return the seconds that an image's FLOPs take at the better of the two rates."""
        with torch.inference_mode():
            rates = [max(work / timed(run) for _ in range(5)) for run, work in self.runs]
        return self.flops / max(rates)


def flops_of_one_image() -> int:
    """Return the number of floating point operations of DETR-R50 for an image of 800x1066."""
    # In plain torch with attention written out, which every version counts in full: see onednn.usable.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        DETR().eval().requires_grad_(False)(pixels_of_one_image().cpu(), keys=KEYS)
    return counter.get_total_flops()


SIDES: dict[str, Callable[..., Any]] = {
    "ours": Ours,
    "Hugging Face": lambda dtype, **settings: Theirs(HuggingFace, dtype, **settings),
    "official": lambda dtype, **settings: Theirs(Official, dtype, **settings),
    "machine's limit": Limit,
}


@functools.cache
def _side(name: str, dtype: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # A spawned process would spawn its data workers too, which takes seconds. The platform's default comes first.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    return SIDES[name](dtype, **dict(settings))


def _forward(*side: Any) -> float:
    _side(*side).forward()  # warm up: another process had the last turn
    seconds: float = _side(*side).forward()
    return seconds


def _job(arguments: dict[str, Any], warm_up: bool, *side: Any) -> float:
    if warm_up:
        _side(*side).forward()
    seconds: float = _side(*side).job(**arguments)
    return seconds


def _idle(*side: Any) -> float:
    share: float = _side(*side).idle
    return share


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _end_with_parent() -> None:
    """End when the benchmark is killed: a contestant that keeps running would slow down the next measurement."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Contestant(contextlib.AbstractContextManager["Contestant"]):
    """A side in its own process.

    Args:
        name: One of `SIDES`.
        dtype: `float32` or `bfloat16`.
        settings: The side's settings.
    """

    def __init__(self, name: str, dtype: str, **settings: Any) -> None:
        self.name, self.dtype = name, dtype
        self._side = name, dtype, tuple(settings.items())
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent)

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def forward(self) -> float:
        """Run the model alone, once to warm up and once to measure; return seconds."""
        return self._process.submit(_forward, *self._side).result()

    def job(self, warm_up: bool = True, **arguments: Any) -> float:
        """Run the model once to warm up, unless `warm_up` is False, then the whole job; return the job's seconds."""
        return self._process.submit(_job, arguments, warm_up, *self._side).result()

    def idle(self) -> float:
        """Return the share of our last job in which the model was not running, on a CPU."""
        return self._process.submit(_idle, *self._side).result()

    def peak_memory(self) -> float:
        """Return the peak memory of the process so far, in MB."""
        return self._process.submit(_peak).result()
