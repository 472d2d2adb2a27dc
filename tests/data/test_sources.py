"""The images of COCO files, good ones and every kind of bad one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_lightning.data.files import open_file
from detr_lightning.data.headers import HeaderReader, measure
from detr_lightning.data.records import ImageRecord
from detr_lightning.data.sources import COCOImages
from detr_lightning.errors import InputError, UnreadableImageError


def save(folder: Path, name: str, size: tuple[int, int] = (8, 6)) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def annotate(folder: Path, document: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return path


def image(**changes: Any) -> dict[str, Any]:
    return {"id": 7, "file_name": "a.jpg", "width": 8, "height": 6} | changes


def read_coco(folder: Path, annotations: Path) -> tuple[list[ImageRecord], dict[int, str]]:
    source = COCOImages(folder, annotations)
    return source.find(), source.categories


def locate(folder: Path, record: ImageRecord) -> Path:
    with open_file(folder, record) as file:
        return Path(file.name)


class TestReadCoco:
    def test_records_are_sorted_and_no_image_is_opened(self, tmp_path: Path) -> None:
        document = {
            "images": [image(id=9, file_name="sub//./b.jpg", width=640, height=480), image()],
            "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        }
        records, categories = read_coco(tmp_path, annotate(tmp_path, document))
        assert records == [ImageRecord(7, "a.jpg", 8, 6), ImageRecord(9, "sub/b.jpg", 640, 480)]
        assert records[1].size == (480, 640)
        assert categories == {1: "person", 90: "toothbrush"}

    def test_one_file_may_have_two_ids(self, tmp_path: Path) -> None:
        records, categories = read_coco(tmp_path, annotate(tmp_path, {"images": [image(id=0), image(id=999999999999)]}))
        assert [record.image_id for record in records] == [0, 999999999999]
        assert categories == {}

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ([], "list is the format of results"),
            ("images", "contains a str"),
            ({}, "no list 'images'.* It is empty"),
            ({"info": {}, "annotations": []}, "no list 'images'.* Its keys: 'info', 'annotations'"),
            ({"images": {"1": image()}}, "no list 'images'"),
            ({"images": []}, "lists no images"),
            ({"images": ["a.jpg"]}, r"images\[0\] is 'a.jpg', but must be an object"),
            ({"images": [image(), image(file_name="b.jpg")]}, "id 7 occurs twice, for 'a.jpg' and 'b.jpg'"),
            ({"images": [image()], "categories": {"1": "person"}}, "'categories' is .* must be a list"),
            ({"images": [image()], "categories": [{"id": "one", "name": "person"}]}, r"categories\[0\]"),
            ({"images": [image()], "categories": [{"id": 1, "name": n} for n in "ab"]}, "category id 1 occurs twice"),
            ({"images": [image()], "categories": ["person"]}, r"categories\[0\] is 'person'"),
        ],
    )
    def test_not_coco(self, tmp_path: Path, document: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_coco(tmp_path, annotate(tmp_path, document))

    @pytest.mark.parametrize("image_id", ["seven", "", True, 7.5, -1, "-1", 10**12, None, [7], float("nan")])
    def test_bad_id(self, tmp_path: Path, image_id: Any) -> None:
        with pytest.raises(ValueError, match=r"images\[0\]: 'id' is .* integer from 0 to 999999999999"):
            read_coco(tmp_path, annotate(tmp_path, {"images": [image(id=image_id)]}))

    @pytest.mark.parametrize(
        "name",
        [
            *(None, 1, ["a.jpg"], "", ".", "./", "/etc/passwd", "//a.jpg", "..", "../a.jpg", "sub/../../a.jpg"),
            *("sub/..", "..\\a.jpg", "sub\\..\\..\\a.jpg", "\\a.jpg", "C:\\a.jpg", "c:a.jpg", "a\0.jpg", "\ud800.jpg"),
            "a\n/../../b.jpg",
        ],
    )
    def test_bad_file_name(self, tmp_path: Path, name: Any) -> None:
        with pytest.raises(ValueError, match=r"images\[0\]: 'file_name' is"):
            read_coco(tmp_path, annotate(tmp_path, {"images": [image(file_name=name)]}))

    @pytest.mark.parametrize("name", ["..a.jpg", "a..jpg", "a/...jpg", "a b.jpg", "日本.jpg", "ab:1.jpg"])
    def test_odd_but_harmless_file_name(self, tmp_path: Path, name: str) -> None:
        (record,), _ = read_coco(tmp_path, annotate(tmp_path, {"images": [image(file_name=name)]}))
        assert record.file_name == name

    @pytest.mark.parametrize("side", ["wide", True, 8.5, 0, "0", -8, 2**31, [8]])
    @pytest.mark.parametrize("name", ["width", "height"])
    def test_bad_size(self, tmp_path: Path, name: str, side: Any) -> None:
        with pytest.raises(ValueError, match=rf"images\[0\]: '{name}' is"):
            read_coco(tmp_path, annotate(tmp_path, {"images": [image(**{name: side})]}))

    @pytest.mark.parametrize(
        "content",
        [b"", b"\x89PNG\r\n", b"\xff\xfe\xfa", b'{"images": [', b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"],
    )
    def test_not_json(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "annotations.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"annotations\.json (cannot be read as JSON|has no list)"):
            read_coco(tmp_path, path)

    def test_missing(self, tmp_path: Path) -> None:
        annotations = annotate(tmp_path, {"images": [image()]})
        with pytest.raises(FileNotFoundError, match=r"data\.image_dir does not exist: .*nowhere"):
            read_coco(tmp_path / "nowhere", annotations)
        with pytest.raises(FileNotFoundError, match=r"data\.image_dir is not a folder"):
            read_coco(annotations, annotations)
        with pytest.raises(FileNotFoundError, match=r"data\.annotation_file does not exist: .*no\.json"):
            read_coco(tmp_path, tmp_path / "no.json")
        with pytest.raises(FileNotFoundError, match=r"data\.annotation_file is not a file"):
            read_coco(tmp_path, tmp_path)

    def test_sizes_left_out_come_from_the_headers(self, tmp_path: Path) -> None:
        save(tmp_path, "a.png", (30, 20))
        (tmp_path / "b.png").write_bytes(b"")
        entries = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png", "width": 3, "height": None}]
        gone = {"id": 3, "file_name": "c.png"}
        annotations = annotate(tmp_path, {"images": [*entries, gone, image()]})
        source = COCOImages(tmp_path, annotations)
        records, failures = measure(HeaderReader(source), source.find())
        assert records == [ImageRecord(1, "a.png", 30, 20), ImageRecord(7, "a.jpg", 8, 6)]
        assert [record for record, _ in failures] == [ImageRecord(2, "b.png", 0, 0), ImageRecord(3, "c.png", 0, 0)]
        assert failures[0][1] == "empty file (0 bytes)"
        assert failures[1][1] == "no such file"


class TestLocate:
    def test_links_inside_are_followed(self, tmp_path: Path) -> None:
        real = save(tmp_path, "images/real/a.png")
        (tmp_path / "images/b.png").symlink_to("real/a.png")
        (tmp_path / "linked").symlink_to("images")
        assert locate(tmp_path / "linked", ImageRecord(1, "b.png", 8, 6)) == real.resolve()

    def test_links_outside_are_refused(self, tmp_path: Path) -> None:
        save(tmp_path, "secret/a.png")
        save(tmp_path, "images-too/a.png")
        (tmp_path / "images").mkdir()
        (tmp_path / "images/b.png").symlink_to(tmp_path / "secret/a.png")
        (tmp_path / "images/sub").symlink_to(tmp_path / "images-too")
        for name in ("b.png", "sub/a.png"):
            with pytest.raises(UnreadableImageError, match=f"'{name}' in .*symbolic link leads out") as error:
                locate(tmp_path / "images", ImageRecord(1, name, 8, 6))
            assert "images'" not in error.value.reason

    @pytest.mark.parametrize(
        "name", ["gone.png", "folder.png", "pipe.png", "loop.png", "x" * 300 + ".png", "a.png/b.png"]
    )
    def test_no_such_file(self, tmp_path: Path, name: str) -> None:
        save(tmp_path, "a.png")
        (tmp_path / "folder.png").mkdir()
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "loop.png").symlink_to("loop.png")
        with pytest.raises(FileNotFoundError, match="image 5 has no file"):
            locate(tmp_path, ImageRecord(5, name, 8, 6))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-1, 10)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=12)
    | st.sampled_from(["..", "/", "../x", "a/..", "sub/a.jpg", "a.jpg\0", "x" * 5000, 10**400, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
plausible_names = st.sampled_from(["a.jpg", "b.jpg", "sub/c.jpg", "real.png", "empty.png"])
entries = values | st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 9) | values,
        "file_name": plausible_names | values,
        "width": st.integers(1, 99) | values,
        "height": st.integers(1, 99) | values,
        "license": values,
    },
)
good_entries = st.builds(
    image, id=st.integers(0, 999999999999), file_name=plausible_names, width=st.integers(1, 9), height=st.integers(1, 9)
)
documents = values | st.fixed_dictionaries(
    {},
    optional={
        "images": st.lists(good_entries | entries, max_size=4) | values,
        "categories": st.lists(st.builds(dict, id=st.integers(), name=st.text(max_size=4)) | values, max_size=3)
        | values,
        "annotations": values,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save(folder, "real.png")
    (folder / "empty.png").write_bytes(b"")
    return folder


class TestFuzz:
    @settings(max_examples=400, deadline=None)
    @given(document=documents)
    def test_any_json_loads_or_is_refused_clearly(self, folder: Path, document: Any) -> None:
        source = COCOImages(folder, annotate(folder, document))
        try:
            records, failures = measure(HeaderReader(source), source.find())
            categories = source.categories
        except ValueError as refusal:
            error = refusal
        else:
            error = None
        if error is not None:
            assert type(error) is InputError
            assert "annotations.json" in str(error)
            assert len(str(error)) < 1500
            return
        ids = [record.image_id for record in records]
        assert ids == sorted(set(ids))
        assert len(records) + len(failures) == len(document["images"])
        assert all(type(number) is int and isinstance(name, str) for number, name in categories.items())
        for record in records:
            assert 0 <= record.image_id < 10**12
            assert record.width > 0
            assert record.height > 0
            try:
                assert locate(folder, record).is_relative_to(folder.resolve())
            except FileNotFoundError:
                assert record.file_name != "real.png"

    @settings(max_examples=200, deadline=None)
    @given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: f'{{"images": {text}}}'.encode()))
    def test_any_bytes_load_or_are_refused_clearly(self, folder: Path, content: bytes) -> None:
        annotations = folder / "bytes.json"
        annotations.write_bytes(content)
        with pytest.raises(ValueError, match=r"bytes\.json"):
            read_coco(folder, annotations)
