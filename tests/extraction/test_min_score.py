"""`writer.min_score`: files keep the queries that see something, and whatever reads them knows which these are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from coco_factory import Coco
from ran import RunCLI
from rich.filesize import decimal

from detr_lightning.analysis.evaluation import evaluate_store
from detr_lightning.analysis.features import object_features
from detr_lightning.analysis.objects import objects
from detr_lightning.errors import InputError, SettingError
from detr_lightning.format import files
from detr_lightning.format.keys import AXES, KEYS
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.__main__ import main
from detr_lightning.store.export import export
from detr_lightning.store.verify import verify

QUERY_KEYS = [key for key in KEYS if "queries" in AXES[key]]


@pytest.fixture(scope="module")
def stores(
    coco_folder: Coco, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EmbeddingStore, EmbeddingStore, float]:
    """The same images with all queries and with about half of them, and the score between."""
    from detr_lightning.command.main import main

    folder = tmp_path_factory.mktemp("min_score")
    common = ["predict", *map(str, coco_folder.data), "--model.weights", str(tiny_weights)]
    common += ["--model.keys", f"[{','.join(KEYS)}]", "--data.batch_size", "1", "--output_dir"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cli.py"])
        assert main([*common, str(folder / "full")]) == 0
        full = EmbeddingStore(folder / "full")
        scores = full.stack("pred_logits")[1].softmax(-1)[..., :-1].amax(-1)
        # Between the queries of an image, and above those of another one, which keeps none.
        min_score = float(scores[scores.amax(1).argsort()[1]].median())
        assert main([*common, str(folder / "kept"), "--writer.min_score", str(min_score)]) == 0
    return full, EmbeddingStore(folder / "kept"), min_score


def test_each_tensor_keeps_the_queries_that_score_enough(
    stores: tuple[EmbeddingStore, EmbeddingStore, float],
) -> None:
    full, kept, min_score = stores
    assert kept.embedding_keys == (*KEYS, "query_index")
    assert kept.metadata["min_score"] == kept.min_score == min_score
    counts = []
    for image_id in full:
        whole, part = full[image_id], torch.load(kept.path(image_id))
        assert tuple(part) == kept.embedding_keys
        expected = (whole["pred_logits"].softmax(-1)[:, :-1].amax(-1) >= min_score).nonzero().flatten()
        assert part["query_index"].dtype == torch.int64
        assert torch.equal(part["query_index"], expected)
        counts.append(len(expected))
        assert kept.entry(image_id).num_queries == len(expected)
        for key in KEYS:
            if key in QUERY_KEYS:
                assert torch.equal(part[key], whole[key].index_select(AXES[key].index("queries"), expected)), key
            else:
                assert torch.equal(part[key], whole[key]), key
    assert min(counts) == 0
    assert any(0 < count < 10 for count in counts)
    assert "num_queries" not in full.metadata["images"][0]
    assert verify(kept.folder) == []


def test_rows_are_all_kept_queries(stores: tuple[EmbeddingStore, EmbeddingStore, float]) -> None:
    full, kept, _ = stores
    everything = full.rows("query_embeddings")
    assert everything.values.shape == (80, 32)
    for key, shape in (("query_embeddings", (32,)), ("decoder_output", (2, 32)), ("query_index", ())):
        rows = kept.rows(key)
        assert len(rows.image_ids) == len(rows.queries) == sum(kept.entry(i).num_queries or 0 for i in kept)
        assert rows.values.shape[1:] == shape
        for image_id, query, value in zip(rows.image_ids.tolist(), rows.queries.tolist(), rows.values, strict=True):
            if key == "query_index":
                assert value == query
            else:
                whole = full.load(image_id, key).movedim(AXES[key].index("queries"), 0)
                assert torch.equal(value, whole[query])
    some = kept.rows("query_embeddings", kept.image_ids[-2:])
    assert set(some.image_ids.tolist()) <= set(kept.image_ids[-2:])
    with pytest.raises(SettingError, match="encoder_output has no axis of queries"):
        kept.rows("encoder_output")
    with pytest.raises(SettingError, match="different shapes cannot be read as rows"):
        kept.rows("cross_attention")


def test_stacking_offers_rows(stores: tuple[EmbeddingStore, EmbeddingStore, float]) -> None:
    _, kept, _ = stores
    with pytest.raises(SettingError, match=r"different shapes cannot be stacked\. Pool it .*store\.rows\('query_emb"):
        kept.stack("query_embeddings")
    with pytest.raises(SettingError, match="no kept queries"):
        kept.stack("query_embeddings", pool="max")
    ids = [image_id for image_id in kept if kept.entry(image_id).num_queries]
    assert kept.stack("query_embeddings", ids, pool="mean")[1].isfinite().all()


def test_objects_are_those_of_the_full_store(stores: tuple[EmbeddingStore, EmbeddingStore, float]) -> None:
    full, kept, min_score = stores
    for threshold in (min_score, min_score * 1.1):
        pd.testing.assert_frame_equal(objects(kept, threshold), objects(full, threshold))
    table = objects(full, min_score)
    for name, matrix in object_features(full, table).items():
        assert object_features(kept, table)[name] == pytest.approx(matrix), name
    with pytest.raises(SettingError, match="does not keep query"):
        object_features(kept, objects(full, 0.0), ["decoder_output"])


def test_what_needs_all_queries_is_refused(
    stores: tuple[EmbeddingStore, EmbeddingStore, float], coco_folder: Coco, tmp_path: Path
) -> None:
    _, kept, min_score = stores
    with pytest.raises(SettingError, match=r"threshold is .* keeps only queries that score"):
        objects(kept, min_score / 2)
    with pytest.raises(InputError, match="Average precision needs all"):
        evaluate_store(kept, coco_folder.annotations)
    with pytest.raises(SettingError, match="threshold is 0"):
        export(kept, tmp_path / "a.json", "coco")
    export(kept, tmp_path / "a.json", "coco", threshold=min_score)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == len(kept.rows("query_index").values)


def test_attention_of_a_kept_query(stores: tuple[EmbeddingStore, EmbeddingStore, float], coco_folder: Coco) -> None:
    from detr_lightning.analysis.plots import attention

    full, kept, _ = stores
    image_id = next(image_id for image_id in kept if 1 < (kept.entry(image_id).num_queries or 0) < 10)
    query = int(kept.load(image_id, "query_index")[-1])
    drawn = [
        attention(store, image_id, query, image_dir=coco_folder.images).axes[0].images[1].get_array()
        for store in (full, kept)
    ]
    assert (drawn[0] == drawn[1]).all()
    missing = next(number for number in range(10) if number not in kept.load(image_id, "query_index"))
    with pytest.raises(SettingError, match=f"there is no query {missing}"):
        attention(kept, image_id, missing, image_dir=coco_folder.images)


def test_verify_checks_the_index(stores: tuple[EmbeddingStore, EmbeddingStore, float], tmp_path: Path) -> None:
    _, kept, min_score = stores
    shutil.copytree(kept.folder, tmp_path / "out")
    store = EmbeddingStore(tmp_path / "out")
    image_id = max(store, key=lambda i: store.entry(i).num_queries or 0)
    tensors = store[image_id]
    tensors["query_index"] = tensors["query_index"].flip(0)
    tensors["pred_logits"] = tensors["pred_logits"] * 0
    files.save_tensors(store.folder, image_id, tensors)
    problems = "\n".join(verify(tmp_path / "out"))
    assert "query_index does not list queries of the model in ascending order" in problems
    assert f"less than {min_score}" in problems


def test_logits_need_not_be_stored_and_the_setting_is_part_of_the_run(
    run_cli: RunCLI, stores: tuple[EmbeddingStore, EmbeddingStore, float], coco_folder: Coco, tmp_path: Path
) -> None:
    _, kept, min_score = stores
    keys = ("--model.keys", "[query_embeddings]", "--data.batch_size", "1")
    command = ("predict", *coco_folder.data, "--output_dir", tmp_path / "out", *keys)
    ran = run_cli(*command, "--writer.min_score", min_score, "--dry_run")
    assert ran.code == 0, ran.err
    assert "at most" in ran.err
    assert "query_index" in ran.err
    assert run_cli(*command, "--writer.min_score", min_score, "--writer.dtype", "float16").code == 0
    store = EmbeddingStore(tmp_path / "out")
    assert store.embedding_keys == ("query_embeddings", "query_index")
    assert torch.equal(store.rows("query_embeddings").queries, kept.rows("query_embeddings").queries)
    assert store.rows("query_embeddings").values.dtype == torch.float16
    ran = run_cli(*command, "--writer.dtype", "float16")
    assert ran.code == 1
    assert f"writer.min_score was {min_score}, now None" in ran.err
    assert "Nothing to do" in run_cli(*command, "--writer.min_score", min_score, "--writer.dtype", "float16").err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--writer.min_score", "1.5"), "writer.min_score is 1.5; a score is a probability, from 0 to 1"),
        (("--writer.min_score", "nan"), "writer.min_score is 'nan', but must be one of: float, null"),
        (("--model.keys", "[query_index]"), "model.keys is 'query_index', which is not one of"),
    ],
)
def test_bad_settings(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out", *args)
    assert ran.code == 1
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_the_summary_counts_the_kept_queries(
    stores: tuple[EmbeddingStore, EmbeddingStore, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number differs between images, so the first image's bytes say nothing about all."""
    _, kept, _ = stores
    assert main(["summary", str(kept.folder)]) == 0
    rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
    shown = {row[0].strip(): row[-1].strip() for row in rows if row[0].strip() in kept.embedding_keys}
    bytes_of = {key: sum(kept[image_id][key].nbytes for image_id in kept) for key in kept.embedding_keys}
    assert shown == {key: decimal(number) for key, number in bytes_of.items()}
