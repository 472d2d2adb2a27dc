"""The help of `predict` and `validate`, and what is refused before Lightning is imported."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from coco_factory import Coco
from lightning.pytorch import Trainer
from ran import RunCLI

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingWriter
from detr_lightning.command.main import main
from detr_lightning.command.settings import GROUPS_OF, LINKS, help_of, settings
from detr_lightning.command.words import checked_words
from detr_lightning.errors import SettingError

CLASSES = {"data": COCODataModule, "model": DETRExtractor, "writer": EmbeddingWriter, "trainer": Trainer}


@pytest.mark.parametrize("group", CLASSES)
def test_the_settings_are_those_of_the_signature(group: str) -> None:
    parameters = inspect.signature(CLASSES[group]).parameters.values()
    expected = [f"{group}.{parameter.name}" for parameter in parameters]
    found = list(settings(group))
    assert [setting.name for setting in found] == [name for name in expected if name not in LINKS.values()]
    for setting in found:
        default = inspect.signature(CLASSES[group]).parameters[setting.name.partition(".")[2]].default
        assert setting.default == ("" if default is inspect.Parameter.empty else repr(default))
        assert setting.help, f"{setting.name} is not described in the docstring"


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("verb", GROUPS_OF)
def test_the_help_fits_the_terminal_and_shows_our_own_settings(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(verb)
    usages = [line for line in text.splitlines() if line.startswith("  --") or "detr-lightning" in line]
    assert max(len(line) for line in text.splitlines() if line not in usages) <= columns
    for group, defined in CLASSES.items():
        for name in inspect.signature(defined).parameters:
            offered = group in GROUPS_OF[verb] and f"{group}.{name}" not in LINKS.values()
            assert (f"\n  --{group}.{name}" in text) == offered
    assert ("--dry_run" in text) == ("--output_dir" in text) == (verb == "predict")
    assert ("--output FILE.json" in text) == (verb == "validate")
    assert text.count(f"  detr-lightning {verb} ") >= (2 if verb == "predict" else 1)


def test_help_and_misspelt_settings_import_no_lightning(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: {weigths: random}\n")
    script = (
        "import sys\nfrom detr_lightning.command.main import main\n"
        "for words in (['--help'], ['--help_trainer'], ['--data.limt', '2'], ['--config', 'job.yaml']):\n"
        "    main(['predict', *words])\n"
        "assert not {'torch', 'lightning'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "  --trainer.devices" in done.stdout
    assert done.stderr.splitlines() == [
        "Error: There is no setting --data.limt. Did you mean 'data.limit'? detr-lightning predict --help lists them.",
        "Error: job.yaml: There is no setting model.weigths. Did you mean 'model.weights'? "
        "detr-lightning predict --help lists them.",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "x"], "Did you mean 'model.weights'?"),
        (["--trainer.precisoin", "32"], "Did you mean 'trainer.precision'?"),
        (["--extract_type", "all", "--model.keys", "[pred_boxes]"], "both choose the tensors"),
        (["--config"], "--config needs"),
        (["--output", "x.json"], "--output is for validate"),
    ],
)
def test_refused_words_of_predict(words: list[str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        checked_words("predict", words)


@pytest.mark.parametrize("flag", ["--output_dir", "--writer.dtype", "--dry_run", "--extract_type"])
def test_validate_takes_no_flags_that_it_would_ignore(flag: str) -> None:
    with pytest.raises(SettingError, match=f"{flag} is for predict"):
        checked_words("validate", [flag, "x"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: detr_resnet50", "as in 'model: {weights: detr_resnet50}'"),
        ("data: images", "as in 'data: {image_dir: images}'"),
        ("extract_type: all\nmodel: {keys: [pred_boxes]}", "both choose the tensors"),
        ("trainer: {gpus: 1}", "There is no setting trainer.gpus"),
        ("limit: 2", "Did you mean 'data.limit'?"),
        ("data: {limit: 2", "is not valid YAML"),
    ],
)
def test_errors_in_a_config_name_the_file(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(content)
    with pytest.raises(SettingError) as raised:
        checked_words("predict", ["--config", str(tmp_path / "job.yaml")])
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "job.yaml"))


def test_an_extract_type_given_later_sets_keys_aside(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    keys, kind = tmp_path / "keys.yaml", tmp_path / "kind.yaml"
    keys.write_text("model: {keys: [pred_boxes]}\ndata: {limit: 1}\n")
    kind.write_text("extract_type: encoder\n")
    for number, (words, expected) in enumerate(
        (
            (("--config", keys, "--extract_type", "encoder"), ["encoder_output", "pred_logits", "pred_boxes"]),
            (("--config", keys, "--config", kind), ["encoder_output", "pred_logits", "pred_boxes"]),
            (("--config", kind, "--config", keys), ["pred_boxes"]),
            (("--config", kind, "--data.limit", "1", "--model.keys", "[pred_logits]"), ["pred_logits"]),
        )
    ):
        out = tmp_path / str(number)
        ran = run_cli("predict", *coco_folder.data, *words, "--output_dir", out)
        assert ran.code == 0, ran.err
        assert json.loads((out / "metadata.json").read_text())["embedding_keys"] == expected


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["predict", "--help"], ["validate", "-h"], ["predict", "--data.limit", "1", "--help_trainer"]):
        assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.count("usage: detr-lightning") == 2
    assert captured.err == ""
