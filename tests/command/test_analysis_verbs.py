"""The verbs that analyse a folder of embeddings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import parquet
from ran import RunCLI
from store_factory import annotations_of, edit_metadata, make_store

from detr_lightning.analysis.objects import objects
from detr_lightning.command.main import main
from detr_lightning.demo.pictures import ANNOTATION_FILE
from detr_lightning.shipped import DEMO
from detr_lightning.store import EmbeddingStore

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store")


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(annotations_of()))
    return path


def test_objects(store: EmbeddingStore, annotations: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "made" / "objects.parquet"
    assert main(["objects", str(store.folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}: 12 objects in 4 images\n"
    assert len(pd.read_parquet(output)) == 12
    assert main(["objects", str(store.folder), "--output", str(output)]) == 1
    assert "already exists" in capsys.readouterr().err
    argv = ["objects", str(store.folder), "--output", str(output), "--overwrite", "--key", "none", "--threshold", "0"]
    assert main([*argv, "--annotations", str(annotations)]) == 0
    read = pd.read_parquet(output)
    assert len(read) == 40
    assert "embedding" not in read
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote {output}: 40 objects in 4 images"
    shown = {line.split()[1]: int(line.split()[0]) for line in out[1:]}
    assert shown == read.outcome.value_counts().to_dict()
    assert shown["matched"] == 12


def test_objects_of_which_none_is_found(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "objects.parquet"
    assert main(["objects", str(store.folder), "--output", str(output), "--threshold", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {output}: 0 objects in 4 images\n"
    assert "the best is 0.9" in said.err
    assert len(parquet.read_table(output)) == 0


def test_evaluate(store: EmbeddingStore, annotations: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["evaluate", str(store.folder), "--annotations", str(annotations)]
    assert main([*argv, "--output", str(tmp_path / "new" / "metrics.json")]) == 0
    out = capsys.readouterr().out
    numbers = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert numbers["AP"] == pytest.approx(1)
    assert numbers["images"] == 4
    assert "AP50" in out
    assert "1.000" in out
    edit_metadata(store.folder, failed=[{"id": 3, "file_name": "a.jpg", "reason": "broken"}])
    assert main(argv) == 0
    assert "Not included: 1 image that could not be read" in capsys.readouterr().out


def test_evaluate_replaces_no_file_unasked(
    store: EmbeddingStore, annotations: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = ["evaluate", str(store.folder), "--annotations", str(annotations), "--output"]
    metadata = (store.folder / "metadata.json").read_bytes()
    for name in ("metadata.json", "metrics.json"):
        assert main([*argv, str(store.folder / name), "--overwrite"]) == 1
        assert "lies in the extraction's own folder" in capsys.readouterr().err
    assert (store.folder / "metadata.json").read_bytes() == metadata
    assert main([*argv, str(tmp_path / "metrics.json")]) == 0
    assert main([*argv, str(tmp_path / "metrics.json")]) == 1
    assert "metrics.json already exists. Choose another name, or give --overwrite" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "metrics.json"), "--overwrite"]) == 0


def test_evaluate_refuses_what_cannot_give_it(
    store: EmbeddingStore, annotations: Path, tmp_path: Path, capsys: Capture
) -> None:
    few = make_store(tmp_path / "few", keys=("query_embeddings", "pred_logits"))
    assert main(["evaluate", str(few.folder), "--annotations", str(annotations)]) == 1
    assert "has no 'pred_boxes'" in capsys.readouterr().err
    edit_metadata(store.folder, min_score=0.5)
    assert main(["evaluate", str(store.folder), "--annotations", str(annotations)]) == 1
    assert "keeps only queries that score 0.5 or more" in capsys.readouterr().err
    edit_metadata(store.folder, min_score=None)
    other = annotations_of(2)
    annotations.write_text(json.dumps(other))
    assert main(["evaluate", str(store.folder), "--annotations", str(annotations)]) == 1
    assert "another dataset" in capsys.readouterr().err


def test_evaluate_gives_what_validate_gives(run_cli: RunCLI, tmp_path: Path) -> None:
    settings = ["--config", "demo", "--data.limit", "6"]
    words = ["predict", *settings, "--output_dir", tmp_path / "out", "--model.keys", "[pred_logits, pred_boxes]"]
    weights = ["--model.weights", str(DEMO / "detr_demo.pth")]
    assert run_cli(*words, *weights).code == 0
    output = tmp_path / "metrics.json"
    assert (
        main(["evaluate", str(tmp_path / "out"), "--annotations", str(DEMO / ANNOTATION_FILE), "--output", str(output)])
        == 0
    )
    validated = run_cli("validate", *settings, *weights)
    assert validated.code == 0
    shown = {
        words[0]: words[1]
        for line in validated.out.splitlines()
        if len(words := line.replace("│", " ").split()) == 2 and words[0][:2] in ("AP", "AR")
    }
    numbers = json.loads(output.read_text())
    assert numbers["AP"] > 0.5
    assert shown == {name: f"{value:.3f}" for name, value in numbers.items() if name != "images"}


@pytest.mark.parametrize("verb", ["evaluate", "objects"])
def test_warnings_are_printed_as_one_line(
    store: EmbeddingStore, annotations: Path, tmp_path: Path, capsys: Capture, verb: str
) -> None:
    content = annotations_of()
    content["categories"][0]["name"] = "parrot"
    annotations.write_text(json.dumps(content))
    output = tmp_path / {"evaluate": "metrics.json", "objects": "objects.parquet"}[verb]
    argv = [verb, str(store.folder), "--annotations", str(annotations), "--output", str(output)]
    for _ in range(2):  # Also where the same warning was shown before.
        assert main(argv) == 0
        assert capsys.readouterr().err == (
            f"Warning: {annotations} and {store.name} name categories differently: "
            "1 is 'parrot' in the annotations and 'person' in the model.\n"
        )
        output.unlink()


def in_new_process(script: str, *paths: Path) -> str:
    """Run Python code that knows `folder`, `annotations` and `output`, and return what it printed to stderr."""
    script = "import sys\nfolder, annotations, output = sys.argv[1:]\n" + script
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_verbs_need_no_lightning(store: EmbeddingStore, annotations: Path, tmp_path: Path) -> None:
    script = (
        "from detr_lightning.command.main import main\n"
        "assert main(['objects', folder, '--annotations', annotations, '--output', output]) == 0\n"
        "assert main(['evaluate', folder, '--annotations', annotations]) == 0\n"
        "sys.exit(' '.join({'lightning', 'torchvision'} & sys.modules.keys()) or None)\n"
    )
    in_new_process(script, store.folder, annotations, tmp_path / "objects.parquet")


def test_the_verbs_without_optional_packages(store: EmbeddingStore, annotations: Path, tmp_path: Path) -> None:
    """After a plain `pip install` each verb works, or names the command that installs what it needs."""
    script = (
        "optional = 'pyarrow pandas matplotlib sklearn faiss embedding_atlas fiftyone lance duckdb scipy'.split()\n"
        "sys.modules |= dict.fromkeys(optional)\n"
        "from detr_lightning.command.main import main\n"
        "assert main(['summary', folder]) == 0\n"
        "assert main(['evaluate', folder, '--annotations', annotations]) == 0\n"
        "assert main(['objects', folder, '--output', output]) == 1\n"
        "assert main(['search', folder, '--image', 'photo.jpg']) == 1\n"
        "assert main(['explore', folder]) == 1\n"
        "assert main(['convert', folder, output]) == 1\n"
    )
    stderr = in_new_process(script, store.folder, annotations, tmp_path / "objects.parquet")
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert [line.partition("pip install 'detr-lightning[")[2].partition("]'")[0] for line in errors] == [
        "analysis",
        "analysis",
        "explore",
        "lance",
    ]
    assert not list(tmp_path.glob("*.parquet"))


def test_summary_counts_the_categories(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    assert main(["summary", str(store.folder)]) == 0
    out = capsys.readouterr().out
    assert "Objects that score 0.7 or more in 4 images" in out
    table = objects(store)
    for name, rows in table.groupby("category"):
        (line,) = [line for line in out.splitlines() if line.replace("│", " ").split()[:1] == [name]]
        words = line.replace("│", " ").split()
        assert (words[1], words[-1]) == (str(len(rows)), f"{rows.score.mean():.2f}")
        assert words[2].count("█") == round(24 * len(rows) / table.category.value_counts().max())
    few = make_store(tmp_path / "few", keys=("query_embeddings",))
    assert main(["summary", str(few.folder)]) == 0
    assert "Objects that score" not in capsys.readouterr().out


def test_summary_of_many_categories_and_images(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_lightning.command.summary.SHOWN", 1)
    monkeypatch.setattr("detr_lightning.command.summary.READ", 2)
    assert main(["summary", str(make_store(tmp_path / "out").folder)]) == 0
    out = capsys.readouterr().out
    assert "in 2 images of 4" in out
    assert "2 others" in out
