"""The configs and the demo that come with the package: inside it in a wheel, next to it in a clone."""

from __future__ import annotations

import os
from pathlib import Path

from detr_lightning.errors import SettingError, did_you_mean

PACKAGE = Path(__file__).resolve().parent
HOME = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent
DEMO = HOME / "assets" / "demo"


def config_names() -> list[str]:
    """Return the names that `--config` accepts instead of a path."""
    return sorted(path.stem for path in (HOME / "configs").glob("*.yaml"))


def config_file(name: str | os.PathLike[str]) -> Path:
    """Return the file of a config.

    Args:
        name: A path, or the name of a config that comes with the package. An existing file takes precedence.

    Raises:
        SettingError: `name` is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    # `configs/decoder.yaml`, as in the documentation, also works without a clone.
    known = path.suffix == ".yaml" and path.parent == Path("configs")
    stem = path.stem if known else str(name)
    names = config_names()
    if stem in names:
        return HOME / "configs" / f"{stem}.yaml"
    hint = did_you_mean(stem, names)
    raise SettingError(f"--config is {str(name)!r}, which is neither a file nor one of {', '.join(names)}.{hint}")


def demo_file(path: str) -> str:
    """Return a path, or the package's copy if it names a demo file that is missing from the working directory."""
    relative = Path(path)
    if relative.parts[:2] == ("assets", "demo") and not relative.exists():
        return str(HOME / relative)
    return path
