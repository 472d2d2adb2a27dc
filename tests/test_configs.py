"""Every file of configs/ fits the signatures that it configures, and is found by its name without a clone."""

from __future__ import annotations

from pathlib import Path

import pytest
from ran import RunCLI

from detr_lightning import shipped
from detr_lightning.command.words import checked_words
from detr_lightning.errors import SettingError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses_against_the_signatures(path: Path) -> None:
    from detr_lightning.command.cli import DETRCLI

    class Parsed(DETRCLI):
        """The command, up to where it would make a model."""

        def before_instantiate_classes(self) -> None:
            raise EOFError

    for verb in ("predict", "validate"):
        with pytest.raises(EOFError):
            Parsed(verb, checked_words(verb, ["--config", str(path)]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_begins_with_its_command(path: Path) -> None:
    comments = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in comments if line.startswith(("python cli.py", "detr-lightning"))]
    assert commands
    assert all(f"--config configs/{path.name}" in line or f"--config {path.stem}" in line for line in commands)
    assert {"Needs", "Leaves"} <= {line.split()[0] for line in comments if line}


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = shipped.HOME / "configs" / "decoder.yaml"
    assert shipped.config_file("decoder") == inside
    assert shipped.config_file("configs/decoder.yaml") == inside
    Path("decoder").write_text("data: {limit: 1}\n")
    assert shipped.config_file("decoder") == Path("decoder")


@pytest.mark.parametrize("name", ["decodr", "decodr.yaml", "../configs/decodr.yaml", ""])
def test_an_unknown_name_lists_those_there_are(name: str) -> None:
    with pytest.raises(SettingError, match=r"--config is .* neither a file nor one of all, backbone"):
        shipped.config_file(name)
    if name == "decodr":
        with pytest.raises(SettingError, match="Did you mean 'decoder'"):
            shipped.config_file(name)


def test_the_demo_runs_by_name_in_an_empty_folder(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_cli("predict", "--config", "demo", "--model.weights", "assets/demo/detr_demo.pth", "--data.limit", "2")
    assert ran.code == 0, ran.err
    assert len(list(Path("demo_output").glob("embedding_*.pt"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["demo_output"]
