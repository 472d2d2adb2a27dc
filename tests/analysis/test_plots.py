from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from store_factory import annotations_of, make_store

from detr_lightning.analysis import plots
from detr_lightning.analysis.objects import objects, write
from detr_lightning.analysis.plots.style import color_of, ink_on
from detr_lightning.analysis.search import ObjectSearch
from detr_lightning.format.keys import KEYS
from detr_lightning.shipped import DEMO
from detr_lightning.store import EmbeddingStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    folder = tmp_path_factory.mktemp("plots")
    content = annotations_of(4, 5)
    for image in content["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 255, (image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"], quality=50)
    return make_store(folder / "store", content, keys=KEYS, image_dir=folder)


@pytest.fixture(scope="module")
def sigmoid_store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """What an RT-DETRv2 of random weights, three feature levels and labels of its own makes of the demo's pictures."""
    from detr_lightning import extract

    folder = tmp_path_factory.mktemp("rt_detr_v2")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "model")
        from family_reference import build, save

        weights = save(build("rt_detr_v2"), folder / "weights")
    extract(DEMO / "images", weights=weights, output_dir=folder / "out", limit=6, progress=False)
    return EmbeddingStore(folder / "out")


def drawn(figure: Figure, path: Path) -> np.ndarray:
    """Draw a figure and return its pixels."""
    figure.savefig(path, dpi=60)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.std() > 5
    return pixels


def texts(figure: Figure) -> list[str]:
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    return inside + [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_detections_have_the_shape_of_the_image_and_their_labels(store: EmbeddingStore, tmp_path: Path) -> None:
    for image_id, ratio in ((7, 480 / 640), (17, 640 / 480)):
        figure = plots.detections(store, image_id)
        pixels = drawn(figure, tmp_path / "a.png")
        assert pixels.shape[0] / pixels.shape[1] == pytest.approx(ratio, rel=0.01)
        expected = objects(store, image_ids=[image_id])
        labels = {f"{row.category} {row.score:.2f}" for row in expected.itertuples()}
        assert set(texts(figure)) == labels


def test_labels_can_be_larger(store: EmbeddingStore) -> None:
    sizes = [plots.detections(store, 7, label_scale=scale).axes[0].texts[0].get_fontsize() for scale in (1, 2)]
    assert sizes[1] == pytest.approx(2 * sizes[0])


def test_notebooks_show_a_figure(store: EmbeddingStore) -> None:
    assert plots.detections(store, 7)._repr_png_().startswith(b"\x89PNG")


def test_labels_do_not_cover_each_other(store: EmbeddingStore, tmp_path: Path) -> None:
    figure = plots.detections(store, 7, threshold=0.0)  # All queries: crowded.
    drawn(figure, tmp_path / "a.png")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 5
    # A little of the font's own margin may touch.
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(width, height) < 2


def test_attention_of_the_likeliest_or_of_chosen_queries(store: EmbeddingStore, tmp_path: Path) -> None:
    figure = plots.attention(store, 7)
    drawn(figure, tmp_path / "a.png")
    assert len(texts(figure)) == 4
    figure = plots.attention(store, 7, query=[1, 0], layer=0)
    drawn(figure, tmp_path / "a.png")
    assert [text.split(":")[0] for text in texts(figure)] == ["query 1", "query 0"]
    table = objects(store, image_ids=[7])  # Its numbers are NumPy's.
    assert texts(plots.attention(store, 7, query=table["query"][1]))[0].startswith("query 1:")
    assert len(texts(plots.attention(store, 7, query=table["query"][:3]))) == 3
    figure = plots.attention(store, 7, query=range(8))  # Three rows of three.
    assert [axes.axison for axes in figure.axes] == [False] * 9
    with pytest.raises(ValueError, match="no query 10; image 7 has 0 to 9"):
        plots.attention(store, 7, query=10)
    with pytest.raises(ValueError, match="layer is 3; the decoder has 3 layers, 0 to 2"):
        plots.attention(store, 7, layer=3)


def test_neighbours_are_the_most_similar_of_other_images(store: EmbeddingStore, tmp_path: Path) -> None:
    table = objects(store)
    figure = plots.neighbours(store, table, index=[0, 6], k=3)
    drawn(figure, tmp_path / "a.png")
    titles = [axes.get_title() for axes in figure.axes]
    vectors = np.stack(table.embedding)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = np.where(table.image_id == table.image_id[0], -1, vectors @ vectors[0])
    best = np.sort(similarity)[::-1][:3]
    assert titles[0] == table.category[0]
    assert [title.split()[-1] for title in titles[1:4]] == [f"{value:.2f}" for value in best]
    best = table.score.argmax()
    assert plots.neighbours(store, table, best).axes[0].get_title() == table.category[best]
    with pytest.raises(ValueError, match="there is no row 99"):
        plots.neighbours(store, table, 99)
    with pytest.raises(ValueError, match="no other object"):
        plots.neighbours(store, objects(store, image_ids=[7]))


def test_a_map_of_embeddings_names_its_categories(store: EmbeddingStore, tmp_path: Path) -> None:
    table = objects(store)
    figure = plots.embedding_map(table, max_categories=2)
    drawn(figure, tmp_path / "a.png")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-1].startswith("1 others")
    assert len(legend) == 3
    with pytest.raises(ValueError, match="three objects or more"):
        plots.embedding_map(table[:2])
    with pytest.raises(ValueError, match="method is 'tsne'"):
        plots.embedding_map(table, "tsne")


def test_every_picture_of_a_model_with_sigmoid_scores_and_several_levels(
    sigmoid_store: EmbeddingStore, tmp_path: Path
) -> None:
    store, image_id = sigmoid_store, sigmoid_store.image_ids[1]
    table = objects(store, 0.5)
    own = table[table.image_id == image_id]
    assert len(own) > 3
    assert set(table.category) <= {"cat", "dog", "hamster", "tortoise", "canary"}
    probabilities = store.load(image_id, "pred_logits").sigmoid().amax(-1).numpy()
    assert np.allclose(own.score, probabilities[own["query"]])

    write(table, tmp_path / "objects.parquet")
    picture = np.asarray(Image.open(store.image_path(image_id)).convert("RGB"))
    found = ObjectSearch(tmp_path / "objects.parquet").search(np.stack(own.embedding), 3)
    figures = {
        "detections": plots.detections(store, image_id, threshold=0.5),
        "embedding_map": plots.embedding_map(table),
        "layer_similarity": plots.layer_similarity(store),
        "neighbours": plots.neighbours(store, table, [0, 3], k=3),
        "search_results": plots.search_results(store, own, found, picture),
    }
    assert {*figures, "attention"} == set(plots.__all__)
    for name, figure in figures.items():
        drawn(figure, tmp_path / f"{name}.png")
    labels = {f"{row.category} {row.score:.2f}" for row in own.itertuples()}
    assert set(texts(figures["detections"])) <= labels
    assert {axes.get_title() for axes in figures["search_results"].axes[::4]} == labels
    assert {text.get_text().split()[0] for text in figures["embedding_map"].legends[0].get_texts()} == set(
        table.category
    )
    with pytest.raises(ValueError, match=r"is from a rt_detr_v2, whose decoder attends to a few points"):
        plots.attention(store, image_id)


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap-learn is installed")
def test_a_missing_umap_says_what_to_do(store: EmbeddingStore) -> None:
    with pytest.raises(ImportError, match="pip install umap-learn"):
        plots.embedding_map(objects(store), "umap")


@pytest.mark.parametrize("measure", ["cka", "cosine"])
def test_layers_are_equal_to_themselves(store: EmbeddingStore, tmp_path: Path, measure: str) -> None:
    figure = plots.layer_similarity(store, measure=measure)
    drawn(figure, tmp_path / "a.png")
    grid = figure.axes[0].images[0].get_array()
    assert grid.shape == (3, 3)
    assert np.allclose(grid, grid.T)
    assert np.allclose(np.diagonal(grid), 1)
    assert texts(figure)[0] == "1.00"


def test_cka_is_that_of_the_gram_matrices(store: EmbeddingStore) -> None:
    _, stacked = store.stack("decoder_output")
    grids = [layer.flatten(0, 1).double().numpy() for layer in stacked.transpose(0, 1)]
    grams = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in grids]
    expected = (grams[0] * grams[2]).sum() / np.sqrt((grams[0] ** 2).sum() * (grams[2] ** 2).sum())
    grid = plots.layer_similarity(store).axes[0].images[0].get_array()
    assert grid[0, 2] == pytest.approx(expected, rel=1e-4)


def test_categories_keep_their_colour_and_labels_their_contrast() -> None:
    colors = [color_of(category_id) for category_id in range(1, 91)]
    assert len(set(colors)) == 90
    assert colors[0] == color_of(1)
    assert {ink_on(color) for color in colors} == {"white", "#222222"}


def test_tables_without_embeddings(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match="no embeddings"):
        plots.embedding_map(objects(store, key=None))
    table = objects(store)
    table["embedding"] = table["embedding"].where(table["query"] > 0)
    with pytest.raises(ValueError, match="they were missed"):
        plots.embedding_map(table)


def test_what_is_missing_is_named(tmp_path: Path, store: EmbeddingStore) -> None:
    few = make_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"has no 'cross_attention'.* Add cross_attention to model.keys and"):
        plots.attention(few, 7)
    with pytest.raises(FileNotFoundError, match="Give image_dir"):
        plots.detections(few, 7)
    with pytest.raises(ValueError, match=r"scores 1\.0 or more"):
        plots.detections(store, 7, threshold=1.0)


def test_no_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("detr_lightning.analysis.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'detr-lightning\[analysis\]'"):
        importlib.import_module("detr_lightning.analysis.plots")


def test_no_window_is_needed() -> None:
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
