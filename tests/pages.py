"""The blocks of code on a page, which tests run. `python tests/pages.py python README.md` prints those in Python."""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """Return the content of a page's blocks in a language, such as `python` or `bash ci`, in their order."""
    return [content for kind, content in BLOCK.findall(path.read_text(encoding="utf-8")) if kind.strip() == language]


if __name__ == "__main__":
    print("\n".join(blocks(Path(sys.argv[2]), sys.argv[1])), end="")
