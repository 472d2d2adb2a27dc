"""The names of the categories that logits stand for, and their COCO ids."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
"""COCO's panoptic categories that are not objects, by id."""


@functools.cache
def coco_names() -> dict[int, str]:
    """Return the names of COCO's 80 object categories by category id, 1 to 90 with gaps."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(names) if name not in ("__background__", "N/A")}


def names_of_config(config: Mapping[str, Any]) -> dict[int, str] | None:
    """Return the names in a Hugging Face config's `id2label`, or None if it has only placeholders.

    Raises:
        ValueError: `id2label` is not a mapping from numbers to names.
    """
    labels = config.get("id2label") or {}
    if not isinstance(labels, Mapping):
        raise ValueError(f"id2label is a {type(labels).__name__}, but must map logit indices to names.")
    try:
        names = {int(number): str(name) for number, name in labels.items()}
    except (TypeError, ValueError):
        raise ValueError("id2label has an index that is not an integer.") from None
    names = {number: name for number, name in names.items() if name != "N/A" and not re.fullmatch(r"LABEL_\d+", name)}
    return names or None


def coco_ids(names: Mapping[int, str] | None, num_categories: int) -> tuple[int, ...] | None:
    """Return each logit's COCO category id, or None if the names are not COCO's.

    Args:
        names: The names by logit index.
        num_categories: The number of logits without "no object".

    Returns:
        The indices themselves if there are no names, or if COCO's names are at their ids; COCO's ids in order if its 80
        names are in order from index 0; None otherwise.
    """
    coco = coco_names()
    if not names or all(_same(name, (coco | STUFF).get(number, "")) for number, name in names.items()):
        return tuple(range(num_categories))
    contiguous = dict(enumerate(coco.values()))
    if num_categories == len(coco) and all(_same(name, contiguous.get(i, "")) for i, name in names.items()):
        return tuple(coco)
    return None


OLD_NAMES = {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
             "diningtable": "dining table", "tvmonitor": "tv"}  # fmt: skip
"""Pascal VOC's names of COCO's categories, which some checkpoints keep."""


def _same(one: str, other: str) -> bool:
    one = one.strip().lower().replace("_", " ")
    return OLD_NAMES.get(one, one) == other


def compare_names(model: Mapping[int, str], annotated: Mapping[int, str]) -> tuple[str, bool]:
    """Compare the names of a model's categories with those in annotations, id by id.

    Returns:
        A description of the first differences, empty if all names agree; and whether no name agrees. A model without
        names counts as agreeing.
    """
    if not model:
        return "", False
    ids = {_plain(name): number for number, name in model.items()}
    differences = []
    for number, name in annotated.items():
        if _plain(model.get(number, "")) == _plain(name):
            continue
        other = ids.get(_plain(name))
        differences.append(
            f"{number} is {name!r} in the annotations and {repr(model[number]) if number in model else 'no category'} "
            f"in the model" + ("" if other is None else f", which has {name!r} at {other}")
        )
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more, 0 < len(differences) == len(annotated)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())
