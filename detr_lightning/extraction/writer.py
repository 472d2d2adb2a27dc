"""The callback that writes embeddings to disk during the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from detr_lightning.data.datamodule import COCODataModule, require_all_batches
from detr_lightning.data.sources import NONE_KNOWN
from detr_lightning.errors import SettingError, SettingTypeError, check_choice
from detr_lightning.extraction.image_writer import ImageWriter
from detr_lightning.extraction.layouts import planned_run, previous_runs
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.extraction.run import IF_EXISTS
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.keys import DTYPES, QUERY_INDEX, nbytes
from detr_lightning.format.names import is_url
from detr_lightning.format.schema import FILES, LAYOUTS, Metadata
from detr_lightning.ranks import from_rank_0, gather
from detr_lightning.system import without_collector


class EmbeddingWriter(BasePredictionWriter):
    """Writes one `embedding_{image_id:012d}.pt` per image, or one table, and `metadata.json` at the end.

    Args:
        output_dir: The folder, created if missing; for a table also a URL, such as `s3://bucket/embeddings`.
        dtype: How embeddings are stored, `float32` or `float16`. Logits and boxes stay float32.
        if_exists: What to do if the folder is not empty: `resume` computes what is missing, `overwrite` replaces what
            earlier runs wrote, and `error` stops.
        threads: How many threads write files.
        min_score: Keep only queries whose best category scores at least this, from 0 to 1, and list them in
            `query_index`. By default all queries are kept.
        layout: `files` for one file per image, `lance` for one table of all images, on a disk or an object store.
        commit_seconds: With `lance`, a process commits its work after this many seconds: a kill loses no older work.

    Raises:
        SettingError: A setting is not allowed; the message names the allowed values.
    """

    def __init__(
        self,
        output_dir: str = "./embeddings_output",
        dtype: str = "float32",
        if_exists: str = "resume",
        threads: int = 2,
        min_score: float | None = None,
        layout: str = "files",
        commit_seconds: float = 30.0,
    ) -> None:
        super().__init__("batch")
        if not output_dir:
            raise SettingError("output_dir is empty. Name a folder; '.' is the current one.")
        self.layout = check_choice("writer.layout", layout, LAYOUTS)
        if is_url(output_dir) and layout == FILES:
            raise SettingError(
                f"output_dir {output_dir} is a URL, but writer.layout=files needs a folder. Use writer.layout=lance."
            )
        if commit_seconds <= 0:
            raise SettingError(f"writer.commit_seconds is {commit_seconds}, but must be more than 0.")
        self.commit_seconds = commit_seconds
        # Absolute, so that a later chdir changes nothing.
        self.output_dir = output_dir if is_url(output_dir) else Path(output_dir).expanduser().absolute()
        self.dtype = check_choice("writer.dtype", dtype, DTYPES)
        self.if_exists = check_choice("writer.if_exists", if_exists, IF_EXISTS)
        if threads < 1:
            raise SettingError(f"writer.threads is {threads}, but must be at least 1.")
        self.threads = threads
        if min_score is not None and not 0 <= min_score <= 1:
            raise SettingError(f"writer.min_score is {min_score}; a score is a probability, from 0 to 1.")
        self.min_score = min_score
        self.extraction: PlannedRun | None = None
        self.finished: frozenset[int] = frozenset()
        self.metadata: Metadata | None = None
        self._images: ImageWriter | None = None

    @property
    def images_written(self) -> int:
        """The number of images that this process has written in the last run."""
        return 0 if self._images is None else self._images.images_written

    @property
    def bytes_written(self) -> int:
        """Their size on disk in bytes."""
        return 0 if self._images is None else self._images.bytes_written

    @without_collector()
    def plan(self, trainer: Trainer, model: DETRExtractor, data: COCODataModule) -> PlannedRun:
        """Compare the job with the content of the output folder, and change nothing.

        Raises:
            OSError: The folder is a file, cannot be read, or (`if_exists` is `error`) is not empty.
            InputError: It contains another program's files, or an extraction with other settings or images.
            SettingError: The Trainer would stop early, or the folder is `data.image_dir`.
        """
        require_all_batches(trainer, "predict")
        folder = self.output_dir.resolve() if isinstance(self.output_dir, Path) else None
        if data.image_dir and folder == Path(data.image_dir).resolve():
            raise SettingError(f"output_dir {self.output_dir} is data.image_dir. Choose another folder.")
        previous = previous_runs(self.layout, self.output_dir) if self.if_exists == "resume" else None
        data.known = previous.known if previous is not None else NONE_KNOWN
        data.find_images()
        self.extraction = self._run(trainer, model, data, previous)
        self.extraction.inspect()
        return self.extraction

    def _run(self, trainer: Trainer, model: DETRExtractor, data: COCODataModule, previous: Any = None) -> PlannedRun:
        settings = {
            "output_dir": str(self.output_dir),
            "dtype": self.dtype,
            "if_exists": self.if_exists,
            "min_score": self.min_score,
            "layout": self.layout,
        }
        return planned_run(trainer, model, data, settings, previous, self.commit_seconds)

    def keys(self, model: DETRExtractor) -> tuple[str, ...]:
        """Return the keys of each file."""
        return model.keys if self.min_score is None else (*model.keys, QUERY_INDEX)

    def bytes_needed(self, model: DETRExtractor) -> int:
        """Estimate the bytes that the pending images will take; with `min_score` this is an upper bound."""
        assert self.extraction is not None, "plan comes first"
        container = 2048
        architecture = model.detr.architecture
        shape = architecture.shape
        return sum(
            container + nbytes(self.keys(model), shape, architecture.feature_sizes(entry.input_size), self.dtype)
            for entry in self.extraction.pending
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the run on rank 0, and send the other ranks the finished ids.

        Raises:
            OSError: The folder cannot be used, or is not the same for all ranks.
            InputError: It contains another program's files, or an extraction with other settings or images.
            SettingError: The Trainer would stop early, or the folder is `data.image_dir`.
            SettingTypeError: The model is not a `DETRExtractor`, or the data module not a `COCODataModule`.
            BusyError: Another run is at work in the folder.
        """
        if stage != "predict":
            return
        data: COCODataModule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, DETRExtractor) or not isinstance(data, COCODataModule):
            raise SettingTypeError("EmbeddingWriter needs a DETRExtractor and a COCODataModule.")
        self.metadata = self._images = None
        token, self.finished, data.images = from_rank_0(trainer, lambda: self._begin(trainer, pl_module, data))
        problems = gather(trainer, self._join(trainer, pl_module, data, token))
        from_rank_0(trainer, lambda: self._check_ranks(problems))
        pl_module.further_keys = () if self.min_score is None else ("pred_logits",)

    def _begin(
        self, trainer: Trainer, model: DETRExtractor, data: COCODataModule
    ) -> tuple[str | None, frozenset[int], Any]:
        """Begin on rank 0; return the run's token, the finished ids and the images, which all ranks need."""
        run = self.extraction or self.plan(trainer, model, data)
        run.begin()
        run.join(0)
        return run.token, frozenset(run.finished), data.images

    def _join(self, trainer: Trainer, model: DETRExtractor, data: COCODataModule, token: str | None) -> str | None:
        """Join the run that rank 0 began; return why this rank cannot, or None if it can."""
        if trainer.is_global_zero:
            return None
        try:
            self.extraction = self._run(trainer, model, data)
            if token is None or not self.extraction.shares_folder(token):
                return f"output_dir {self.output_dir} is not rank 0's folder. Choose one that all nodes share."
            self.extraction.join(trainer.global_rank)
        except Exception as raised:
            return str(raised) or repr(raised)
        return None

    def _check_ranks(self, problems: list[str | None]) -> None:
        assert self.extraction is not None
        problems = problems if any(problems) else self.extraction.unseen(len(problems))
        if any(problems):
            raise OSError(
                "; ".join(f"rank {rank} of {len(problems)}: {text}" for rank, text in enumerate(problems) if text)
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the writing threads, and let SIGTERM end the run as Ctrl-C does."""
        # After the data workers were forked: threads and fork do not mix.
        assert isinstance(pl_module, DETRExtractor)
        assert self.extraction is not None
        self._images = ImageWriter(
            self.extraction,
            self.threads,
            pl_module.keys,
            self.dtype,
            self.min_score,
            pl_module.checkpoint.scoring,
            self.finished,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand a batch to the writing threads; block only if too many images are waiting already.

        Raises:
            OSError: A file could not be written.
            InputError: A value is not finite, or does not fit into `dtype`.
        """
        run, images = self.extraction, self._images
        assert run is not None
        assert images is not None
        for image_id, reason in batch["failed"]:
            if image_id not in self.finished:
                run.fail(image_id, reason)
        for image_id, details in batch.get("details", {}).items():
            run.images[image_id] = replace(run.images[image_id], **details)
        images.submit(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the waiting images; on rank 0 also wait for the other ranks and write the metadata.

        Raises:
            IncompleteError: An image is neither on disk nor listed as skipped.
            RuntimeError: Another rank ended early.
            OSError: A file could not be written.
            InputError: A value is not finite, or does not fit into `dtype`.
        """
        assert self.extraction is not None
        assert self._images is not None
        self._images.wait()
        self.extraction.leave(done=True)
        self._images.close()
        if trainer.is_global_zero:
            with without_collector():
                self.metadata = self.extraction.finish(trainer.world_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the waiting images, finish the files that are being written, and release the folder."""
        if self._images is not None:
            self._images.close()
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder, even if nothing was predicted."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DETRExtractor):
            pl_module.further_keys = ()
        if self.extraction is not None:
            self.extraction.leave(done=False)
            self.extraction.release()
            self.extraction = None
        self.finished = frozenset()
