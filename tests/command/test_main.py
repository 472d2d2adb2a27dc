"""The whole command: its verbs, its help, and the errors that it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import detr_lightning
from detr_lightning.command import main as module
from detr_lightning.command.main import main
from detr_lightning.command.verbs import VERBS, load_verb

Capture = pytest.CaptureFixture[str]


def test_the_help_shows_every_verb_with_an_example(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name} " in text
        assert verb.help in text
        assert f"$ detr-lightning {name} {verb.example}\n" in text
    assert main([]) == 1
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) <= 80


def test_version_and_verbs_that_read_folders_import_no_lightning(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom detr_lightning.command.main import main\n"
        "for argv in (['--version'], ['--help'], ['predct']): main(argv)\n"
        "assert 'torch' not in sys.modules\n"
        "for verb in ('summary', 'verify', 'export'):\n"
        "    argv = [verb, sys.argv[1], *(['--output', 'x'] if verb == 'export' else [])]\n"
        "    assert main(argv) == 1\n"
        "assert 'lightning' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"detr-lightning {detr_lightning.__version__}\nusage: ")
    assert done.stderr.count("Error: ") == 3  # verify lists what it finds instead


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["predct"], ["no verb 'predct'", "Did you mean 'predict'?", ", ".join(VERBS)]),
        (["--config", "x.yaml", "predict"], ["The verb comes first", "detr-lightning predict --config ..."]),
        (["--outptu", "x"], ["The verb comes first"]),
        (["verify"], ["detr-lightning verify", "folder", "--help"]),
        (["verify", "x", "--worker", "2"], ["--worker", "Did you mean '--workers'?"]),
        (["export", "x", "--output", "y", "--format", "csv"], ["'csv'", "parquet"]),
        (["summary", "no/such/folder"], ["no/such/folder"]),
    ],
)
def test_a_wrong_command_line_is_one_message(argv: list[str], said: list[str], capsys: Capture) -> None:
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    for words in said:
        assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if not verb.lightning])
def test_each_verb_has_help_of_its_own(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: detr-lightning {verb} {VERBS[verb].example}" in text


def test_the_examples_of_the_help_parse() -> None:
    for name, verb in VERBS.items():
        if not verb.lightning:
            parser = module.VerbParser(name)
            load_verb(name).add_arguments(parser)
            parser.parse_args(verb.example.split())


@pytest.mark.parametrize("entry", ["cli.py", "-m detr_lightning", "-m detr_lightning.store"])
def test_other_names_of_the_command(entry: str) -> None:
    root = Path(detr_lightning.__file__).parents[1]
    command = [sys.executable, *entry.split(), "--version"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"detr-lightning {detr_lightning.__version__}\n"), done.stderr


def test_an_error_in_the_program_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({}))

    def fail(name: str) -> None:
        raise ValueError(f"a bug in {name}")

    monkeypatch.setattr(module, "load_verb", fail)
    with pytest.raises(ValueError, match="a bug in summary"):
        main(["summary", str(tmp_path)])
