"""The protocol of an extraction, prepare, plan, predict, finish, which the command and `extract()` both follow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.errors import IncompleteError, SettingError, count
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.extraction.writer import EmbeddingWriter
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.schema import Metadata
from detr_lightning.launch import InterruptibleWait, launched_by_rank_0, launched_ranks
from detr_lightning.ranks import from_rank_0, waits_for_launch
from detr_lightning.system import available_cores, has_instructions, restore_settings


class Job:
    """One extraction: a model, images, a Trainer and, unless the embeddings stay in memory, a writer.

    Args:
        trainer: The Trainer; `writer` is among its callbacks.
        model: The model.
        data: The images.
        writer: The callback that writes.

    Attributes:
        complete: After `plan`: whether nothing is left to do.
    """

    def __init__(
        self, trainer: Trainer, model: DETRExtractor, data: COCODataModule, writer: EmbeddingWriter | None = None
    ) -> None:
        self.trainer, self.model, self.data, self.writer = trainer, model, data, writer
        self.complete = False

    def prepare(self, precision: Any = None, allow_slow_precision: bool = False) -> None:
        """Refuse a Trainer that cannot do it, and download missing files.

        Args:
            precision: The precision that was asked for. Lightning itself replaces `16-mixed` on a CPU.
            allow_slow_precision: Whether the processor may lack instructions for it.

        Raises:
            SettingError: The precision or the strategy cannot be used.
            OSError: The download failed.
        """
        check_trainer(self.trainer, precision, allow_slow_precision)
        if self.trainer.local_rank == 0:
            self.data.prepare_data()

    def plan(self) -> PlannedRun | None:
        """Find the images and compare them with the output folder, on rank 0 alone; change nothing.

        Returns:
            The planned run on rank 0, else None. Without a writer there is none.

        Raises:
            DETRLightningError: The images or the folder cannot be used as asked.
            OSError: A file or folder is not there or cannot be read.
        """
        if self.trainer.world_size == 1 or waits_for_launch(self.trainer):
            if self.trainer.is_global_zero:
                self.complete = self._plan()
        elif not launched_by_rank_0():
            # A launcher has started all ranks at once, and any of them would wait for one that stops here.
            with meeting(self.trainer):
                self.trainer.strategy.setup_environment()
            self.complete = from_rank_0(self.trainer, self._plan)
        return self.writer.extraction if self.writer else None

    def _plan(self) -> bool:
        self.data.use_model(self.model.checkpoint)
        if self.writer is None:
            self.data.find_images()
            complete = False
        else:
            complete = self.writer.plan(self.trainer, self.model, self.data).complete
        self.model.warn_of_names(self.data)
        self.data.workers(self.trainer)  # which refuses more than fit
        return complete

    def predict(self) -> None:
        """Run the model over the images that are not finished, if there are any; callbacks take its results."""
        if not self.complete:
            with restore_settings(), meeting(self.trainer):
                self.trainer.predict(self.model, self.data, return_predictions=False)

    def finish(self) -> Metadata | None:
        """Return the metadata that this run wrote: on rank 0, with a writer, and if there was anything to do.

        Raises:
            IncompleteError: The run ended before all images were there.
        """
        if self.writer is None or not self.trainer.is_global_zero:
            return None
        if not self.complete and self.writer.metadata is None:
            raise IncompleteError(f"The run ended before all images were in {self.writer.output_dir}. {KEPT}")
        return self.writer.metadata


KEPT = "What is finished is kept: run the same command again to go on."


class _Met(Callback):
    """Ends a wait when the ranks have met."""

    def __init__(self, wait: InterruptibleWait) -> None:
        self._wait = wait

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the wait."""
        self._wait.close()


@contextlib.contextmanager
def meeting(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end this process while it waits for the other ranks."""
    if trainer.world_size == 1:
        yield
        return
    # Rank 0 first: Lightning kills a rank 0 whose ranks have ended.
    seconds, message = (2, "Error: Interrupted.") if trainer.is_global_zero else (10, "")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    with InterruptibleWait(message, seconds) as wait:
        met = _Met(wait)
        callbacks.append(met)
        try:
            yield
        finally:
            callbacks.remove(met)


def check_trainer(trainer: Trainer, precision: Any = None, allow_slow_precision: bool = False) -> None:
    """Refuse settings of a Trainer that DETR cannot follow.

    Args:
        trainer: The Trainer.
        precision: The precision that was asked for; by default the Trainer's.
        allow_slow_precision: Whether the processor may lack instructions for it.

    Raises:
        SettingError: The precision, the strategy or the number of devices cannot be used.
    """
    precision = str(precision or trainer.precision)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if precision.startswith("16") and on_cpu:
        others = ", bf16-mixed or bf16-true" if has_instructions("bf16-mixed", "cpu") else ""
        raise SettingError(f"trainer.precision {precision} needs a GPU, and this run is on a CPU. Use 32-true{others}.")
    if not (allow_slow_precision or has_instructions(precision, trainer.strategy.root_device.type)):
        raise SettingError(
            f"trainer.precision {precision} would take about ten times as long as 32-true: this processor has no "
            "instructions for bfloat16. Use 32-true, or --allow_slow_precision."
        )
    check_strategy(trainer)
    launched = launched_ranks()
    if launched is not None and launched != trainer.world_size:
        raise SettingError(
            f"A launcher has started {count(launched, 'process')}, but trainer.devices x trainer.num_nodes is "
            f"{trainer.num_devices} x {trainer.num_nodes}. Make them equal, with trainer.strategy ddp, or start the "
            "command without the launcher; if there was none, unset WORLD_SIZE."
        )
    cores = available_cores()
    if on_cpu and trainer.num_devices > 2 * cores:
        raise SettingError(
            f"trainer.devices is {trainer.num_devices}: as many processes on {count(cores, 'core')} would fill the "
            f"memory. On a CPU use at most {2 * cores}, twice the number of cores; one per core is fastest."
        )


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy whose ranks do not each run the command.

    Raises:
        SettingError: It shards the model, or starts ranks inside this process.
    """
    strategy = trainer.strategy
    launcher = type(strategy.launcher).__name__
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or "MultiProcessing" in launcher:
        raise SettingError(
            f"trainer.strategy {getattr(strategy, 'strategy_name', type(strategy).__name__)!r} cannot be used: each "
            "rank needs a process and a whole model of its own. Use trainer.strategy ddp with the command, "
            "torchrun or srun; in a notebook, one device."
        )
