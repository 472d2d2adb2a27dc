"""The configs and the demo, which come with the package: inside it in a wheel, beside it in a clone."""

from __future__ import annotations

import os
from pathlib import Path

from detr_lightning.errors import SettingError, did_you_mean

PACKAGE = Path(__file__).resolve().parent
HOME = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent
DEMO = HOME / "assets" / "demo"


def config_names() -> list[str]:
    """Return the names that `--config` takes instead of a path."""
    return sorted(path.stem for path in (HOME / "configs").glob("*.yaml"))


def config_file(name: str | os.PathLike[str]) -> Path:
    """Return the file of a config.

    Args:
        name: A path, or the name of a config that comes with the package. A file of that name wins.

    Raises:
        SettingError: It is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    # `configs/decoder.yaml`, as every page writes it, works without a clone too.
    known = path.suffix == ".yaml" and path.parent == Path("configs")
    stem = path.stem if known else str(name)
    names = config_names()
    if stem in names:
        return HOME / "configs" / f"{stem}.yaml"
    hint = did_you_mean(stem, names)
    raise SettingError(f"--config is {str(name)!r}, which is neither a file nor one of {', '.join(names)}.{hint}")


def demo_file(path: str) -> str:
    """Return the package's own copy of a demo file, named as in configs/demo.yaml, unless the working folder has it."""
    relative = Path(path)
    if relative.parts[:2] == ("assets", "demo") and not relative.exists():
        return str(HOME / relative)
    return path
