"""`detr-lightning predict` and `detr-lightning validate`, through LightningCLI."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.filesize import decimal

from detr_lightning import shipped
from detr_lightning.command import reports
from detr_lightning.command.endings import exit_code, this_rank
from detr_lightning.command.parser import CommandError, CommandParser
from detr_lightning.command.plain_warnings import plain_warnings
from detr_lightning.command.settings import LINKS
from detr_lightning.data.datamodule import COCODataModule, require_all_batches
from detr_lightning.data.files import image_folder
from detr_lightning.errors import KEPT, count
from detr_lightning.extraction.run import free_bytes
from detr_lightning.extraction.writer import EmbeddingWriter
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.files import write_json
from detr_lightning.job import Job, check_launcher, check_trainer, meeting
from detr_lightning.launch import launched_by_rank_0, sigterm_as_interrupt
from detr_lightning.progress import ImageProgress
from detr_lightning.ranks import waits_for_launch
from detr_lightning.system import quiet_lightning, restore_settings


class DETRCLI(LightningCLI):
    """LightningCLI for `predict` and `validate`."""

    def __init__(self, verb: str, words: Sequence[str]) -> None:
        self.console = Console(stderr=True, markup=False)
        self.summary: dict[str, float] = {}
        self.verb = verb
        super().__init__(
            DETRExtractor,
            COCODataModule,
            args=[verb, *words],
            parser_class=CommandParser,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults=dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # so no unused parser is built
        """Return the verb, with the Trainer's arguments that it does not offer."""
        not_offered = "model dataloaders datamodule ckpt_path weights_only return_predictions verbose"
        return {self.verb: set(not_offered.split())}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's settings and the top-level ones."""
        parser.add_lightning_class_args(EmbeddingWriter, "writer")
        parser.add_argument("--extract_type", type=str, default="decoder")
        parser.add_argument("--output_dir", type=str, default="./embeddings_output")
        parser.add_argument("--dry_run", action="store_true")
        parser.add_argument("--allow_slow_precision", action="store_true")
        parser.add_argument("--output", type=str | None, default=None)
        for source, target in LINKS.items():
            parser.link_arguments(source, target)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, which `checked_words` has already checked."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Check that the images exist before the weights are loaded, or even downloaded.

        Raises:
            FileNotFoundError: The image folder does not exist.
            CommandError: A dry run would have to download the images.
        """
        settings = self.config[self.subcommand]
        data = settings.data
        for group, name in ((settings.model, "weights"), (data, "image_dir"), (data, "annotation_file")):
            if group[name]:
                group[name] = shipped.demo_file(group[name])
        if data.download and self._dry_run:
            data.download = False
            for name in filter(None, (data.image_dir, data.annotation_file)):
                if not Path(name).expanduser().exists():
                    raise CommandError(
                        f"--dry_run downloads nothing, and {name} does not exist. Without --dry_run, this command "
                        "first downloads COCO val2017, 5,000 images (1 GB)."
                    )
        if data.download:
            return
        try:
            image_folder(os.path.expanduser(data.image_dir))
        except FileNotFoundError as error:
            if Path(data.annotation_file or "").name != "instances_val2017.json":
                raise
            raise FileNotFoundError(f"{error}. To download COCO val2017 (1 GB) to it: --data.download true") from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer, with a progress bar that counts images.

        Raises:
            CommandError: Lightning rejects the value of a setting.
        """
        config = self._trainer_settings
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        shown = config.enable_progress_bar is not False and not config.barebones
        if shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            kwargs["callbacks"] = [*filter(None, callbacks), ImageProgress(self.console)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, RuntimeError, ImportError) as error:
            raise CommandError(f"trainer: {error}") from error
        # Lightning read the rank from the environment, which may be left over from another job.
        vars(rank_zero_only)["rank"] = trainer.global_rank
        return trainer

    @property
    def writer(self) -> EmbeddingWriter:
        """The callback that writes the embeddings."""
        writer: EmbeddingWriter = self._get(self.config_init, "writer")
        return writer

    def before_predict(self) -> None:
        """Print the plan, and check that it can be carried out.

        Raises:
            SettingError: The disk has too little space, or a setting cannot be used.
        """
        check_launcher(self.trainer)
        self.job = Job(self.trainer, self.model, self.datamodule, self.writer)
        self.job.prepare(self._trainer_settings.precision, self._allow_slow_precision)
        if self.job.plan() is None:
            return
        needed, free = self.writer.bytes_needed(self.model), free_bytes(self.writer.output_dir)
        self._print(*reports.announcement(self.job, free))
        if free is not None and needed > free:
            raise CommandError(
                f"output_dir {self.writer.output_dir} needs {decimal(needed)}, but its disk has {decimal(free)} free. "
                "Free some space, or choose another output_dir, fewer keys (model.keys) or writer.dtype=float16."
            )

    def predict(self, **kwargs: Any) -> None:
        """Run the extraction, without keeping the predictions in memory.

        Raises:
            IncompleteError: The run ended before all images were extracted.
        """
        if self._dry_run or self.job.complete:
            return
        began = time.monotonic()
        self.job.predict()
        metadata = self.job.finish()
        if metadata is None:
            return
        self._print(*reports.result(self.writer, metadata, time.monotonic() - began, self.trainer.world_size))

    def before_validate(self) -> None:
        """Check the settings, and prepare the data.

        Raises:
            SettingError: The annotations are missing, or a setting cannot be used.
        """
        check_launcher(self.trainer)
        check_trainer(self.trainer, self._trainer_settings.precision, self._allow_slow_precision)
        if self._output is not None and self._output.is_dir():
            raise CommandError(f"--output {self._output} is a folder. Name a file, such as metrics.json.")
        if self.datamodule.annotation_file is None:
            raise CommandError("validate needs data.annotation_file: COCO annotations to compare with.")
        require_all_batches(self.trainer, "val")
        if self.trainer.local_rank == 0:
            self.datamodule.prepare_data()
        self.datamodule.use_model(self.model.checkpoint)
        if self.trainer.world_size == 1 or (waits_for_launch(self.trainer) and self.trainer.is_global_zero):
            self.datamodule.setup("validate")  # before other ranks are launched, so that they get its result

    def validate(self, **kwargs: Any) -> None:
        """Compute COCO's detection metrics, print them, and write them to the file of `--output`."""
        with restore_settings(), meeting(self.trainer):
            self.trainer.validate(**kwargs, verbose=False)
        self.summary = self.model.metrics
        if this_rank() == 0:
            images = count(len(self.model.validated), "image")
            lines = f"{self.model.checkpoint.name} on {images}", reports.metrics(self.summary)
            Console(markup=False).print(*lines, sep="\n", highlight=False)
            if self._output is not None:
                self._output.parent.mkdir(parents=True, exist_ok=True)
                content = {"model": self.model.checkpoint.name, "num_images": len(self.model.validated), **self.summary}
                write_json(self._output, content)
        names = {record.image_id: record.file_name for record in self.datamodule.records}
        failures = [(record.file_name, reason) for record, reason in self.datamodule.failures]
        self._print(
            *reports.skipped([*failures, *((names[image_id], reason) for image_id, reason in self.model.skipped)])
        )

    @property
    def _trainer_settings(self) -> Any:
        return self.config_init[self.subcommand].trainer

    @property
    def _output(self) -> Path | None:
        output: str | None = self.config[self.subcommand].output
        return None if output is None else Path(output).expanduser()

    @property
    def _allow_slow_precision(self) -> bool:
        return bool(self.config[self.subcommand].allow_slow_precision)

    @property
    def _dry_run(self) -> bool:
        return bool(self.config[self.subcommand].dry_run)

    def _print(self, *things: Any) -> None:
        if this_rank() == 0:
            for thing in things:
                self.console.print(thing, highlight=False, soft_wrap=isinstance(thing, str))


def run(verb: str, words: Sequence[str]) -> int:
    """Run `predict` or `validate`.

    Args:
        verb: `predict` or `validate`.
        words: The arguments after the verb, as `checked_words` returns them.

    Returns:
        The exit code; see `exit_code`.
    """
    if launched_by_rank_0():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def command() -> None:
        with quiet_lightning(), plain_warnings(lambda: this_rank() == 0), sigterm_as_interrupt():
            DETRCLI(verb, words)

    return exit_code(command, kept=KEPT if verb == "predict" else "")  # validate keeps no results
