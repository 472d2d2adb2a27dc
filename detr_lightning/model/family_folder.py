"""Loading of the other detectors from a folder in transformers' layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from detr_lightning.errors import InputError, MissingPackageError
from detr_lightning.format.keys import Size
from detr_lightning.model.checkpoint import Checkpoint
from detr_lightning.model.detr.hugging_face import read_config, weight_files
from detr_lightning.model.family import MODEL_TYPES, FamilyDetector
from detr_lightning.model.image_processor import load_processor
from detr_lightning.model.labels import coco_ids, coco_names, names_of_config
from detr_lightning.model.transformers_package import INSTALL, import_transformers, without_report
from detr_lightning.model.weight_checks import refuse_misfits, refuse_non_finite
from detr_lightning.model.weight_files import first_line, sha256_of


def load_folder(folder: Path, name: str, model_type: str) -> Checkpoint:
    """Load a detector from a folder in transformers' layout.

    Args:
        folder: The folder.
        name: The name shown to users.
        model_type: The `model_type` of the folder's config.

    Raises:
        FileNotFoundError: A file is missing.
        MissingPackageError: transformers is not installed, or too old for the model.
        InputError: The model's type is not supported, a file cannot be read, or the files do not fit each other.
    """
    config = read_config(folder)
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{folder} contains a model of type {model_type!r}, which is not supported. "
            f"Supported types: detr, {', '.join(MODEL_TYPES)}."
        )
    files = weight_files(folder)
    processor, preprocessing = load_processor(folder, model_type)
    fixed = (preprocessing.height, preprocessing.width)
    input_size = None if fixed[0] is None or fixed[1] is None else (fixed[0], fixed[1])
    model = load_model(folder, config, files, input_size)
    try:
        names = names_of_config({"id2label": model.model.config.id2label})
        shape = model.architecture.shape
    except Exception as error:  # The network does not run at the given size.
        height, width = model.probed
        advice = "Check `size` in its preprocessor_config.json."
        if input_size is None:
            advice = (
                "Its preprocessor_config.json sets no fixed size: add the height and width that it was trained with."
            )
        raise InputError(
            f"{folder}: this {model_type} does not run on an image of {height}x{width} pixels (height x width): "
            f"{first_line(error)}. {advice}"
        ) from error
    softmax = model.kind.scoring == "softmax"
    ids = coco_ids(names, shape.num_logits - softmax) if names else None
    if ids and names:  # some checkpoints spell COCO's names differently
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
        config: The content of its `config.json`.
        files: Its weight files.
        input_size: Height and width of every image; None if sizes vary.

    Raises:
        MissingPackageError: transformers is not installed, or too old for the model.
        InputError: The weights are not safetensors or do not fit the config, or the config is not supported.
    """
    model_type = config["model_type"]
    transformers = import_transformers(model_type)
    if any(file.suffix != ".safetensors" for file in files):
        raise InputError(
            f"{folder} stores its weights as {sorted(files)[0].name}. A {model_type} is read only from safetensors: "
            "save it with save_pretrained of a recent transformers."
        )
    eval_idx, layers = config.get("eval_idx", -1), config.get("decoder_layers", 6)
    if eval_idx not in (-1, layers - 1):
        raise InputError(f"{folder}: eval_idx is {eval_idx}, but only models whose last layer predicts can be read.")
    settings = {"trust_remote_code": False, "local_files_only": True}
    try:
        loaded = transformers.AutoConfig.from_pretrained(folder, **settings)
        if model_type in ("table-transformer", "conditional_detr"):
            loaded.auxiliary_loss = False  # It would pass normed states on, unlike the published model.
        with without_report(transformers):
            model, report = transformers.AutoModelForObjectDetection.from_pretrained(
                folder,
                config=loaded,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # The report lists them, with their sizes.
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


def _check_report(folder: Path, model_type: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit, which transformers would only log.

    Raises:
        InputError: A tensor is missing, unexpected or of the wrong shape.
    """
    wrong = [f"{key} is missing" for key in report["missing_keys"]]
    wrong += [f"{key} is unknown" for key in report["unexpected_keys"]]
    wrong += [f"{key[0]} is {list(key[1])}, not {list(key[2])}" for key in report["mismatched_keys"]]
    wrong += [str(message) for message in report.get("error_msgs") or ()]
    refuse_misfits(str(folder), f"its config, a {model_type}", sorted(wrong))


def config_digest(config: Mapping[str, Any]) -> bytes:
    """Return a config's content in canonical form for hashing, without fields that do not affect the model."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return json.dumps({k: v for k, v in config.items() if k not in ignored}, sort_keys=True).encode()
