"""The steps of an extraction (prepare, plan, predict, finish), shared by the command line and `extract()`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.errors import KEPT, IncompleteError, SettingError, count
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
        complete: Whether nothing is left to do; set by `plan`.
    """

    def __init__(
        self, trainer: Trainer, model: DETRExtractor, data: COCODataModule, writer: EmbeddingWriter | None = None
    ) -> None:
        self.trainer, self.model, self.data, self.writer = trainer, model, data, writer
        self.complete = False

    def prepare(self, precision: Any = None, allow_slow_precision: bool = False) -> None:
        """Check the Trainer, and download missing files.

        Args:
            precision: The requested precision, as Lightning replaces `16-mixed` on a CPU; by default, the Trainer's.
            allow_slow_precision: Whether the processor may lack instructions for the precision.

        Raises:
            SettingError: The precision, the strategy or the number of devices cannot be used.
            OSError: The download failed.
        """
        check_trainer(self.trainer, precision, allow_slow_precision)
        if self.trainer.local_rank == 0:
            self.data.prepare_data()

    def plan(self) -> PlannedRun | None:
        """Find the images and compare them with the output folder, on rank 0 only and without writing anything.

        Returns:
            The planned run; None on other ranks, and without a writer.

        Raises:
            DETRLightningError: The images or the folder cannot be used as asked.
            OSError: A file or folder does not exist or cannot be read.
        """
        if self.trainer.world_size == 1 or waits_for_launch(self.trainer):
            if self.trainer.is_global_zero:
                self.complete = self._plan()
        elif not launched_by_rank_0():
            # A launcher has started all ranks at once, and the others would wait for a rank that stops here.
            with meeting(self.trainer):
                self.trainer.strategy.setup_environment()
            self.complete = from_rank_0(self.trainer, self._plan)
        return self.writer.extraction if self.writer else None

    @restore_settings()
    def _plan(self) -> bool:
        self.data.use_model(self.model.checkpoint)
        if self.writer is None:
            self.data.find_images()
            complete = False
        else:
            complete = self.writer.plan(self.trainer, self.model, self.data).complete
        self.model.warn_of_names(self.data)
        self.data.workers(self.trainer)  # raises if they do not fit into shared memory
        return complete

    def predict(self) -> None:
        """Run the model on the unfinished images, if there are any; callbacks receive the results."""
        if not self.complete:
            with restore_settings(), meeting(self.trainer):
                self.trainer.predict(self.model, self.data, return_predictions=False)

    def finish(self) -> Metadata | None:
        """Return the metadata that this run wrote; None on other ranks, without a writer, or if nothing was left to do.

        Raises:
            IncompleteError: The run ended before all images were extracted.
        """
        if self.writer is None or not self.trainer.is_global_zero:
            return None
        if not self.complete and self.writer.metadata is None:
            raise IncompleteError(f"The run ended before all images were written to {self.writer.output_dir}. {KEPT}")
        return self.writer.metadata


class _Met(Callback):
    """Ends a wait once all ranks have connected."""

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
    # Rank 0 ends first: Lightning kills a rank 0 whose other ranks have ended.
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
    """Check that a Trainer's settings can be used.

    Args:
        trainer: The Trainer.
        precision: The requested precision; by default, the Trainer's.
        allow_slow_precision: Whether the processor may lack instructions for the precision.

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
    cores = available_cores()
    if on_cpu and trainer.num_devices > 2 * cores:
        raise SettingError(
            f"trainer.devices is {trainer.num_devices}: that many processes on {count(cores, 'core')} would fill the "
            f"memory. On a CPU use at most {2 * cores}, twice the number of cores; one per core is fastest."
        )


def check_launcher(trainer: Trainer) -> None:
    """Check that the launcher, if there is one, has started as many ranks as the Trainer has.

    Only for the command: `extract` is one process under any launcher.

    Raises:
        SettingError: It has started a different number.
    """
    launched = launched_ranks()
    if launched is not None and launched != trainer.world_size:
        raise SettingError(
            f"A launcher has started {count(launched, 'process')}, but trainer.devices x trainer.num_nodes is "
            f"{trainer.num_devices} x {trainer.num_nodes}. Make them equal, with trainer.strategy ddp, or start the "
            "command without the launcher; if there was none, unset WORLD_SIZE."
        )


def check_strategy(trainer: Trainer) -> None:
    """Check that each rank of a strategy is a process with the whole model.

    Raises:
        SettingError: The strategy shards the model, or forks or spawns its ranks.
    """
    strategy = trainer.strategy
    launcher = type(strategy.launcher).__name__
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or "MultiProcessing" in launcher:
        raise SettingError(
            f"trainer.strategy {getattr(strategy, 'strategy_name', type(strategy).__name__)!r} cannot be used: each "
            "rank needs its own process and the whole model. Use trainer.strategy ddp with the command, "
            "torchrun or srun; in a notebook, one device."
        )
