"""A folder in transformers' layout: its network, and the image processor that its network was trained with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_lightning.errors import InputError, MissingPackageError
from detr_lightning.format.keys import Size
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.model.checkpoint import Checkpoint
from detr_lightning.model.detr.hugging_face import read_config, weight_files
from detr_lightning.model.family import MODEL_TYPES, FamilyDetector
from detr_lightning.model.labels import coco_ids, coco_names, names_of_config
from detr_lightning.model.weight_checks import refuse_misfits, refuse_non_finite
from detr_lightning.model.weight_files import first_line, sha256_of

MIN_TRANSFORMERS = "5.9"
"""The lowest release that has all of `MODEL_TYPES`."""

INSTALL = "pip install 'detr-lightning[family]'"


def load_folder(folder: Path, name: str, model_type: str) -> Checkpoint:
    """Read a folder in transformers' layout.

    Args:
        folder: The folder.
        name: Its name for users.
        model_type: The `model_type` of its config.

    Raises:
        FileNotFoundError: A file is missing.
        MissingPackageError: transformers is not installed, or too old for the model.
        InputError: The model is of another kind, or its files do not fit each other.
    """
    config = read_config(folder)
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{folder} holds a model of type {model_type!r}, which is not of DETR's family or cannot be read. "
            f"These can be: detr, {', '.join(MODEL_TYPES)}."
        )
    files = weight_files(folder)
    processor, preprocessing = load_processor(folder, model_type)
    fixed = (preprocessing.height, preprocessing.width)
    input_size = None if fixed[0] is None or fixed[1] is None else (fixed[0], fixed[1])
    model = load_model(folder, config, files, input_size)
    try:
        names = names_of_config({"id2label": model.model.config.id2label})
        shape = model.architecture.shape
    except Exception as error:  # of a network that does not run at the size it is to have
        raise InputError(f"{folder}: a {model_type} that does not run: {first_line(error)}.") from error
    softmax = model.kind.scoring == "softmax"
    ids = coco_ids(names, shape.num_logits - softmax) if names else None
    if ids and names:  # some checkpoints spell COCO's names in another way
        names = {index: coco_names().get(ids[index], name) for index, name in names.items()}
    digest = hashlib.sha256(f"{sha256_of(files)} ".encode() + config_digest(config))
    notes = f"{model_type}: {shape.num_queries} queries, {shape.decoder_layers} decoder layers, {model.kind.scoring}"
    return Checkpoint(
        model,
        name,
        digest.hexdigest(),
        notes,
        preprocessing,
        names,
        ids,
        model.kind.scoring,
        model_type,
        processor,
    )


def load_model(
    folder: Path, config: Mapping[str, Any], files: Collection[Path], input_size: Size | None
) -> FamilyDetector:
    """Build a model of transformers around a folder's weights.

    Args:
        folder: A folder in transformers' layout.
        config: Its `config.json`.
        files: Its files of weights.
        input_size: Height and width that every image has; None where sizes vary.

    Raises:
        MissingPackageError: transformers is not installed, or too old for the model.
        InputError: The weights do not fit the config, or the config asks for what cannot be computed.
    """
    model_type = config["model_type"]
    transformers = import_transformers(model_type)
    if any(file.suffix != ".safetensors" for file in files):
        raise InputError(
            f"{folder} holds its weights as {sorted(files)[0].name}. A {model_type} is read from safetensors alone: "
            "save it with save_pretrained of a recent transformers."
        )
    eval_idx, layers = config.get("eval_idx", -1), config.get("decoder_layers", 6)
    if eval_idx not in (-1, layers - 1):
        raise InputError(f"{folder}: eval_idx is {eval_idx}, and only models whose last layer predicts can be read.")
    settings = {"trust_remote_code": False, "local_files_only": True}
    try:
        loaded = transformers.AutoConfig.from_pretrained(folder, **settings)
        if model_type in ("table-transformer", "conditional_detr"):
            loaded.auxiliary_loss = False  # It would feed normed states on, which is not the published model.
        with _without_report(transformers):
            model, report = transformers.AutoModelForObjectDetection.from_pretrained(
                folder,
                config=loaded,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They are in the report, with their sizes.
                **settings,
            )
    except ImportError as error:
        needs = "timm" if "timm" in str(error) else "a further package"
        raise MissingPackageError(f"{folder} needs {needs}: {INSTALL}.") from error
    except Exception as error:  # of several libraries, by version
        raise InputError(f"{folder} could not be read as a {model_type}: {first_line(error)}.") from error
    _check_report(folder, model_type, report)
    learned = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("anchors")}
    refuse_non_finite(str(folder), learned)
    return FamilyDetector(model, input_size)


def import_transformers(model_type: str) -> Any:
    """Return transformers, if it is there and knows the model.

    Raises:
        MissingPackageError: It is not; the message has the command that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"A {model_type} needs transformers {MIN_TRANSFORMERS} or later: {INSTALL}."
        ) from error
    if model_type not in transformers.CONFIG_MAPPING:
        raise MissingPackageError(
            f"A {model_type} needs transformers {MIN_TRANSFORMERS} or later, and {transformers.__version__} is "
            f"installed: {INSTALL}."
        )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


@contextmanager
def _without_report(transformers: Any) -> Iterator[None]:
    """Keep transformers from printing what `_check_report` raises."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_report(folder: Path, model_type: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit, which transformers only logs.

    Raises:
        InputError: A tensor is missing, unexpected or of another shape.
    """
    wrong = [f"{key} is missing" for key in report["missing_keys"]]
    wrong += [f"{key} is unknown" for key in report["unexpected_keys"]]
    wrong += [f"{key[0]} is {list(key[1])} and not {list(key[2])}" for key in report["mismatched_keys"]]
    wrong += [str(message) for message in report.get("error_msgs") or ()]
    refuse_misfits(str(folder), f"its config, a {model_type}", sorted(wrong))


class Processor:
    """A model's own image processor. It travels to the data workers.

    Args:
        processor: An image processor of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any, size: Size) -> Tensor:
        """Return the pixels of an RGB image of Pillow's, float32 `[3, height, width]`, at a height and width."""
        height, width = size
        made = self.processor(images=image, size={"height": height, "width": width}, return_tensors="pt")
        pixels: Tensor = made["pixel_values"][0]
        return pixels


def load_processor(folder: Path, model_type: str) -> tuple[Processor, Preprocessing]:
    """Return a folder's image processor, and what it does.

    Raises:
        FileNotFoundError: The folder has none.
        InputError: It cannot be read, or does what cannot be planned.
    """
    transformers = import_transformers(model_type)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json, which a {model_type} needs: it says how images become the "
            "model's input. Save the model's image processor there (save_pretrained), or copy that file from the model "
            "it was trained from."
        )
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of several libraries, by version
        raise InputError(f"{folder / 'preprocessor_config.json'}: {first_line(error)}.") from error
    try:
        return Processor(processor), _described(processor)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'preprocessor_config.json'}: {error}") from error


def _described(processor: Any) -> Preprocessing:
    """Return what an image processor does.

    Raises:
        ValueError: It does what cannot be planned.
    """
    if not processor.do_resize or not processor.do_rescale or abs(processor.rescale_factor - 1 / 255) > 1e-6:
        raise ValueError("do_resize and do_rescale must be true, and rescale_factor 1/255.")
    if getattr(processor, "pad_size", None):
        raise ValueError(f"pad_size is {processor.pad_size}, and padding is not done.")
    size = {name: value for name, value in dict(processor.size).items() if value is not None}
    sides: dict[str, Any]
    if size.keys() == {"height", "width"}:
        sides = {"short_side": None, "long_side": None, **size}
    elif "shortest_edge" in size and size.keys() <= {"shortest_edge", "longest_edge"}:
        sides = {"short_side": size["shortest_edge"], "long_side": size.get("longest_edge")}
    else:
        raise ValueError(f"size is {size}; height and width, or shortest_edge with longest_edge, can be used.")
    name = type(processor).__name__
    first = name.startswith("RfDetr")  # It rescales, then resizes without antialiasing.
    normalised = processor.do_normalize
    return Preprocessing(
        **sides,
        mean=tuple(map(float, processor.image_mean)) if normalised else (0.0, 0.0, 0.0),
        std=tuple(map(float, processor.image_std)) if normalised else (1.0, 1.0, 1.0),
        rescale_first=first,
        antialias=not first,
        processor=name,
        backend="pil" if name.endswith("Pil") else "torchvision",
    )


def config_digest(config: Mapping[str, Any]) -> bytes:
    """Return a config's content in one order, to be hashed: names of files and of transformers' release left aside."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return json.dumps({k: v for k, v in config.items() if k not in ignored}, sort_keys=True).encode()
