"""Searching with one more image: `query_objects` and `detr-lightning search`, with the demo's trained model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ran import RunCLI

from detr_lightning.analysis.cached import objects_table
from detr_lightning.analysis.objects import objects, write_objects
from detr_lightning.command.main import main
from detr_lightning.demo import demo
from detr_lightning.query import query_objects
from detr_lightning.shipped import DEMO
from detr_lightning.store import EmbeddingStore

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """The demo's first eight images, extracted from a copy of the weights that a test may move."""
    from detr_lightning import extract

    folder = tmp_path_factory.mktemp("query")
    shutil.copy(DEMO / "detr_demo.pth", folder / "weights.pth")
    extract(
        DEMO / "images",
        weights=folder / "weights.pth",
        output_dir=folder / "out",
        keys=["query_embeddings", "pred_logits", "pred_boxes"],
        short_side=128,
        long_side=213,
        limit=8,
        progress=False,
        model={"nheads": 8, "dilation": False},
    )
    return EmbeddingStore(folder / "out")


def image_of(store: EmbeddingStore, image_id: int) -> Path:
    return DEMO / "images" / store.entry(image_id).file_name


def test_an_image_of_the_store_gives_the_objects_of_the_store(store: EmbeddingStore) -> None:
    image_id = store.image_ids[2]
    own = objects(store, 0.7, image_ids=[image_id])
    found = query_objects(store, image_of(store, image_id))
    assert found["query"].tolist() == own["query"].tolist()
    assert found.category.tolist() == own.category.tolist()
    assert np.array_equal(np.stack(found.embedding), np.stack(own.embedding))  # Bit for bit: the same computation.
    # A box chooses the detection that lies there.
    row = own.iloc[-1]
    chosen = query_objects(store, image_of(store, image_id), box=[round(number) for number in row.bbox])
    assert chosen["query"].tolist() == [row["query"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"image_backend": "torchvision"},
        {"precision": "bf16-true", "allow_slow_precision": True},
        {"max_image_pixels": 10**6},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_settings_of_the_extraction_apply_to_the_image(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    from detr_lightning import extract

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**4)
    monkeypatch.setattr("detr_lightning.job.has_instructions", lambda precision, device: "bf16" not in precision)
    sizes = {"short_side": 128, "long_side": 213, "max_image_pixels": 10**6, "progress": False}
    keys = ["query_embeddings", "pred_logits", "pred_boxes"]
    one = extract(
        image_of(store, store.image_ids[2]),
        weights=DEMO / "detr_demo.pth",
        keys=keys,
        output_dir=tmp_path,
        **sizes | settings,
    )
    found = query_objects(one, image_of(store, store.image_ids[2]))
    assert np.array_equal(np.stack(found.embedding), np.stack(objects(one).embedding))


def test_a_crop_is_what_the_model_sees(store: EmbeddingStore) -> None:
    path = image_of(store, store.image_ids[0])
    with Image.open(path) as image:
        width, height = image.size
        part = image.crop((10, 20, width, height))
    whole = query_objects(store, path, crop=[10, 20, width - 10, height - 20], threshold=0.3)
    alone = query_objects(store, part, threshold=0.3)
    assert np.array_equal(np.stack(whole.embedding), np.stack(alone.embedding))
    assert (whole.x1 - alone.x1).tolist() == pytest.approx([10] * len(alone))
    assert np.stack(whole.bbox)[:, 1] == pytest.approx(np.stack(alone.bbox)[:, 1] + 20)


def test_what_cannot_be_asked(store: EmbeddingStore, tmp_path: Path) -> None:
    path = image_of(store, store.image_ids[0])
    with pytest.raises(ValueError, match=r"crop is \[0, 0, 9999, 10\].* is not inside the image of \d+x\d+ pixels"):
        query_objects(store, path, crop=[0, 0, 9999, 10])
    with pytest.raises(ValueError, match="give x, y, width and height"):
        query_objects(store, path, box=[1, 2, 3])
    with pytest.raises(ValueError, match=r"no object scores 1\.0 or more; the best scores 0"):
        query_objects(store, path, threshold=1.0)
    with pytest.raises(FileNotFoundError, match="Give an image"):
        query_objects(store, tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"text\.jpg: not an image"):
        query_objects(store, tmp_path / "text.jpg")


def test_the_weights_are_those_of_the_extraction(store: EmbeddingStore, tmp_path: Path, tiny_weights: Path) -> None:
    path = image_of(store, store.image_ids[0])
    with pytest.raises(ValueError, match=r"tiny\.pth contains other weights.* Set --weights"):
        query_objects(store, path, weights=tiny_weights)
    weights = store.folder.parent / "weights.pth"
    weights.rename(tmp_path / "moved.pth")
    try:
        with pytest.raises(FileNotFoundError, match="Set --weights"):
            query_objects(store, path)
        assert len(query_objects(store, path, weights=tmp_path / "moved.pth"))
    finally:
        (tmp_path / "moved.pth").rename(weights)


def test_the_command(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    image_id = store.image_ids[1]
    own = objects(store, 0.7, image_ids=[image_id])
    argv = ["search", str(store.folder), "--image", str(image_of(store, image_id)), "-k", "3"]
    assert main([*argv, "--sheet", str(tmp_path / "new" / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {tmp_path / 'new' / 'sheet.png'}"
    heads = [line for line in lines[:-1] if not line.startswith("  ")]
    assert [head.split()[0] for head in heads] == own.category.tolist()
    firsts = [line.split() for line in lines if line.startswith("    1 ")]
    # The nearest of each object is the object itself, by the store's name of its image.
    assert [first[1:3] for first in firsts] == [["1.000", store.entry(image_id).file_name]] * len(own)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert np.asarray(sheet.convert("RGB")).std() > 5
    # The table stays, beside the folder, and serves the next search.
    table = store.folder.with_name("out.objects.parquet")
    made = table.stat().st_mtime_ns
    box = ",".join(str(round(number)) for number in own.bbox[0])
    assert main([*argv, "--box", box]) == 0
    assert table.stat().st_mtime_ns == made
    assert sum(not line.startswith("  ") for line in capsys.readouterr().out.splitlines()) == 1
    assert main([*argv, "--threshold", "0.8"]) == 0  # Other objects: the table is written again.
    assert table.stat().st_mtime_ns != made


def test_the_command_replaces_no_file_unasked(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    photo = tmp_path / "photo.jpg"
    shutil.copy(image_of(store, store.image_ids[1]), photo)
    content = photo.read_bytes()
    argv = ["search", str(store.folder), "--image", str(photo), "-k", "1"]

    def refused(*words: str | Path) -> str:
        assert main([*argv, *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "photo.jpg already exists. Choose another name, or give --overwrite" in refused("--sheet", photo)
    assert photo.read_bytes() == content
    inside = store.folder / "found.png"
    assert "lies in the extraction's own folder" in refused("--sheet", inside, "--overwrite")
    assert "lies in the extraction's own folder" in refused("--table", inside.with_suffix(".parquet"))
    assert "typo.txt does not end in .parquet" in refused("--table", tmp_path / "typo.txt")
    (tmp_path / "found.png").touch()
    assert main([*argv, "--sheet", str(tmp_path / "found.png"), "--overwrite"]) == 0
    assert (tmp_path / "found.png").stat().st_size


def test_a_table_that_the_user_wrote_is_not_replaced(store: EmbeddingStore, capsys: Capture) -> None:
    table = store.folder.with_name("out.objects.parquet")
    table.unlink(missing_ok=True)
    argv = ["search", str(store.folder), "--image", str(image_of(store, store.image_ids[1])), "-k", "1"]
    write = ["objects", str(store.folder), "--output", str(table), "--annotations", str(DEMO / "instances_demo.json")]
    assert main([*write, "--iou", "0.6"]) == 0
    content = table.read_bytes()
    assert main(argv) == 0  # Outcomes do not matter.
    assert main([*argv, "--threshold", "0.6"]) == 1
    assert "out.objects.parquet differs from the table that is needed here in: threshold." in capsys.readouterr().err
    assert main([*argv, "--threshold", "0.6", "--table", str(table)]) == 0
    assert table.read_bytes() == content
    table.unlink()


def test_a_table_that_is_named_is_compared_whole(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    table = write_objects(store, tmp_path / "all.parquet", 0.0)
    image = str(image_of(store, store.image_ids[1]))
    argv = ["search", str(store.folder), "--image", image, "--table", str(table), "-k", "999", "--threshold", "0.9"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    queries = sum(not line.startswith("  ") for line in lines)
    assert len(lines) == queries * (1 + len(pd.read_parquet(table)))
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "without --table, of those it is compared with" in " ".join(capsys.readouterr().out.split())


def test_search_and_explore_share_a_table(store: EmbeddingStore) -> None:
    made = objects_table(store, annotation_file=DEMO / "instances_demo.json").read_bytes()
    assert objects_table(store, outcomes=False).read_bytes() == made
    assert "outcome" not in pd.read_parquet(objects_table(store))


def test_a_table_of_another_extraction(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    table = tmp_path / "objects.parquet"
    other = tmp_path / "other"
    shutil.copytree(store.folder, other)
    assert main(["objects", str(other), "--output", str(table)]) == 0
    argv = ["search", str(store.folder), "--image", "x.jpg", "--table", str(table)]
    assert main(argv) == 1
    assert "belongs to another extraction: its folder is" in capsys.readouterr().err
    assert main([*argv[:-1], str(tmp_path / "mine.parquet"), "--sheet", "x.txt"]) == 1
    assert "a contact sheet must end in" in capsys.readouterr().err


def test_what_the_command_refuses(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    image = str(image_of(store, store.image_ids[0]))

    def refused(*words: str) -> str:
        assert main(["search", str(store.folder), "--image", image, *words]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    assert "argument --crop: '1,2,x,4' is not x,y,width,height in pixels" in refused("--crop", "1,2,x,4")
    assert "argument --box: '1,2,3' is not x,y,width,height in pixels" in refused("--box", "1,2,3")
    assert "is not inside the image of" in refused("--crop", "0,0,5000,10")
    assert "which is not a folder" in refused("--image_dir", str(tmp_path / "none"))
    # Nothing is found: the best score is named each time, rounded down.
    for _ in range(2):
        assert "scores 1.0 or more; the best is 0.9" in refused("--threshold", "1")
    table = tmp_path / "empty.parquet"
    assert main(["objects", str(store.folder), "--output", str(table), "--threshold", "1"]) == 0
    assert "the best is 0.9" in capsys.readouterr().err
    assert f"{table} has no objects to compare with" in refused("--table", str(table))


def test_a_table_of_another_layer(tmp_path: Path, capsys: Capture) -> None:
    """The query's vector is of the layer that the table holds."""
    from detr_lightning import extract

    found = extract(**demo(), keys=["query_embeddings", "pred_logits", "pred_boxes", "decoder_output"], limit=2)
    assert isinstance(found, EmbeddingStore)
    folder, table = str(found.folder), str(tmp_path / "layer.parquet")
    argv = ["objects", folder, "--output", table, "--key", "decoder_output", "--layer"]
    assert main([*argv, "9"]) == 1
    assert "layer is 9; the decoder has 3 layers, 0 to 2" in capsys.readouterr().err
    assert main([*argv, "0"]) == 0
    capsys.readouterr()
    assert (
        main(["search", folder, "--image", str(image_of(found, found.image_ids[0])), "--table", table, "-k", "1"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1::2]] == ["1.000"] * (len(lines) // 2)


def test_a_lance_table(tmp_path: Path, run_cli: RunCLI) -> None:
    pytest.importorskip("lance")
    folder = tmp_path / "out"
    words = ["--config", "demo", "--data.limit", "4", "--model.weights", str(DEMO / "detr_demo.pth")]
    assert run_cli("predict", *words, "--writer.layout", "lance", "--output_dir", folder).code == 0
    image = DEMO / "images" / EmbeddingStore(folder).entry(EmbeddingStore(folder).image_ids[0]).file_name
    ran = run_cli("search", folder, "--image", image, "-k", "2", "--sheet", tmp_path / "sheet.png")
    assert ran.code == 0, ran.err
    first = next(line.split() for line in ran.out.splitlines() if line.startswith("    1 "))
    assert first[1:3] == ["1.000", image.name]
    assert (tmp_path / "sheet.png").is_file()


def test_without_a_device_line_nothing_else_is_printed(store: EmbeddingStore, capsys: Capture) -> None:
    query_objects(store, image_of(store, store.image_ids[0]))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
