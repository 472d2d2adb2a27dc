"""Reading the state of an unfinished run."""

from __future__ import annotations

from pathlib import Path

from detr_lightning.format.files import write_json
from detr_lightning.format.state import read_run, run_to_json, token_of


def test_the_token_is_read_without_the_planned_ids(tmp_path: Path) -> None:
    path = tmp_path / ".extraction" / "run.json"
    path.parent.mkdir()
    assert token_of(tmp_path) is None
    write_json(path, run_to_json("abc", {3, 1}, None))
    run = read_run(tmp_path)
    assert run is not None
    assert (run.token, run.planned, token_of(tmp_path)) == ("abc", {1, 3}, "abc")
    path.write_bytes(path.read_bytes()[:20] + b"not read")
    assert token_of(tmp_path) == "abc"


def test_the_token_of_an_older_version_is_found(tmp_path: Path) -> None:
    path = tmp_path / ".extraction" / "run.json"
    path.parent.mkdir()
    path.write_text('{"void": true, "token": "abc", "planned": [1]}')
    assert token_of(tmp_path) == "abc"
