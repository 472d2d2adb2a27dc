"""Which images there are: COCO files and folders, good ones and every kind of bad one."""

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
from detr_lightning.data.records import Failure, ImageRecord
from detr_lightning.data.selection import read_image_ids, select
from detr_lightning.data.sources import COCOImages, FolderImages
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


def read_folder(folder: Path, known: dict[str, int] | None = None) -> tuple[list[ImageRecord], list[Failure]]:
    source = FolderImages(folder)
    return measure(
        HeaderReader(source), source.find({name: ImageRecord(n, name, 0, 0) for name, n in (known or {}).items()})
    )


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
            ([], "list is a file of results"),
            ("images", "holds a str"),
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
        with pytest.raises(ValueError, match=r"annotations\.json (is not JSON|has no list)"):
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


class TestReadFolder:
    def test_integers_are_ids(self, tmp_path: Path) -> None:
        save(tmp_path, "000000000139.png", (30, 20))
        save(tmp_path, "sub/12.PNG")
        save(tmp_path, "0000000000000007.png")
        records, failures = read_folder(tmp_path)
        assert [(record.image_id, record.file_name) for record in records] == [
            (7, "0000000000000007.png"),
            (12, "sub/12.PNG"),
            (139, "000000000139.png"),
        ]
        assert records[2].size == (20, 30)
        assert failures == []

    @pytest.mark.parametrize(("first", "second"), [("01.png", "1.png"), ("1.bmp", "1.png"), ("a/1.png", "b/1.png")])
    def test_one_id_for_two_files(self, tmp_path: Path, first: str, second: str) -> None:
        save(tmp_path, first)
        save(tmp_path, second)
        with pytest.raises(ValueError, match=f"'{first}' and '{second}' both have the id 1"):
            read_folder(tmp_path)

    def test_others_are_numbered_by_path(self, tmp_path: Path) -> None:
        names = ["a-b/1.png", "a/2.bmp", "a/b/3.tif", "a/b/4.webp", "b.tiff", "c.jpeg", "d.JPG", "x1.png"]
        for name in reversed(names):
            save(tmp_path, name)
        for hidden in (".hidden.png", ".folder/a.png", "a/.b/c.png", "notes.txt", "png"):
            path = tmp_path / hidden
            path.parent.mkdir(exist_ok=True)
            path.write_text("")
        records, _ = read_folder(tmp_path)
        assert [(record.image_id, record.file_name) for record in records] == list(enumerate(names, 1))

    @pytest.mark.parametrize("name", ["1234567890123.png", "-1.png", "1.0.png", "²3.png", "\uff11.png", "1e3.png"])
    def test_what_is_no_integer(self, tmp_path: Path, name: str) -> None:
        save(tmp_path, name)
        save(tmp_path, "55.png")
        assert sorted(record.image_id for record in read_folder(tmp_path)[0]) == [1, 2]

    def test_unreadable_headers_do_not_stop_it(self, tmp_path: Path) -> None:
        save(tmp_path, "2.png")
        (tmp_path / "1.jpg").write_bytes(b"")
        (tmp_path / "3.jpg").write_bytes(b"no image")
        (tmp_path / "4.jpg").symlink_to(tmp_path / "gone.jpg")
        records, failures = read_folder(tmp_path)
        assert records == [ImageRecord(2, "2.png", 8, 6)]
        assert [record for record, _ in failures] == [ImageRecord(n, f"{n}.jpg", 0, 0) for n in (1, 3, 4)]
        reasons = [reason for _, reason in failures]
        assert reasons[:2] == ["empty file (0 bytes)", "not an image, or its header is broken"]
        assert reasons[2] == "no such file"

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(ValueError, match=r"No image in .* looked for \.jpg, .*\.tiff"):
            read_folder(tmp_path)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_folder(tmp_path / "nowhere")

    def test_linked_folders(self, tmp_path: Path) -> None:
        save(tmp_path, "images/sub/1.png")
        save(tmp_path, "other/2.png")
        (tmp_path / "images/again").symlink_to("sub")
        (tmp_path / "images/loop").symlink_to(".")
        assert [record.file_name for record in read_folder(tmp_path / "images")[0]] == ["sub/1.png"]
        (tmp_path / "images/out").symlink_to(tmp_path / "other")
        with pytest.raises(ValueError, match=r"'out' in .* is a symbolic link out of that folder"):
            read_folder(tmp_path / "images")

    @pytest.mark.parametrize(
        ("known", "expected"),
        [
            ({}, {"a.png": 1, "b.png": 2, "c.png": 3}),
            ({"b.png": 1, "c.png": 2}, {"a.png": 3, "b.png": 1, "c.png": 2}),
            ({"b.png": 2}, {"a.png": 1, "b.png": 2, "c.png": 3}),
            ({"gone.png": 1, "c.png": 7}, {"a.png": 2, "b.png": 3, "c.png": 7}),
        ],
    )
    def test_known_files_keep_their_numbers(
        self, tmp_path: Path, known: dict[str, int], expected: dict[str, int]
    ) -> None:
        for name in expected:
            save(tmp_path, name)
        records, _ = read_folder(tmp_path, known)
        assert {record.file_name: record.image_id for record in records} == expected
        assert records == sorted(records, key=lambda record: record.image_id)

    def test_known_integers_keep_their_ids_beside_a_name(self, tmp_path: Path) -> None:
        save(tmp_path, "5.png")
        assert read_folder(tmp_path)[0][0].image_id == 5
        save(tmp_path, "a.png")
        records, _ = read_folder(tmp_path, {"5.png": 5})
        assert [(record.image_id, record.file_name) for record in records] == [(1, "a.png"), (5, "5.png")]
        (tmp_path / "a.png").unlink()
        save(tmp_path, "9.png")
        records, _ = read_folder(tmp_path, {"5.png": 5, "a.png": 1})
        assert [(record.image_id, record.file_name) for record in records] == [(2, "9.png"), (5, "5.png")]


class TestSelect:
    records = tuple(ImageRecord(n, f"{n}.jpg", 8, 6) for n in (30, 10, 20))

    def test_subsets(self) -> None:
        ids = [record.image_id for record in select(self.records)]
        assert ids == [10, 20, 30]
        assert [record.image_id for record in select(self.records, limit=2)] == [10, 20]
        assert [record.image_id for record in select(self.records, limit=9)] == [10, 20, 30]
        assert [record.image_id for record in select(self.records, image_ids=[30, 10, 30])] == [10, 30]
        assert [record.image_id for record in select(self.records, image_ids=[30, 10], limit=1)] == [10]

    def test_file_names_choose_too(self) -> None:
        assert [record.image_id for record in select(self.records, image_ids=["20.jpg", 10])] == [10, 20]
        with pytest.raises(ValueError, match=r"'3.jpg', which is no image's file name\. Did you mean '30.jpg'"):
            select(self.records, image_ids=["3.jpg"])

    def test_a_random_subset_is_always_the_same(self) -> None:
        many = [ImageRecord(n, f"{n}.jpg", 8, 6) for n in range(100)]
        chosen = select(many, limit=10, shuffle_seed=1)
        assert chosen == select(many[::-1], limit=10, shuffle_seed=1)
        assert chosen == sorted(chosen, key=lambda record: record.image_id)
        assert chosen not in (many[:10], select(many, limit=10, shuffle_seed=2))
        with pytest.raises(ValueError, match=r"set data\.limit too"):
            select(many, shuffle_seed=1)

    def test_a_file_of_ids_and_names(self, tmp_path: Path) -> None:
        path = tmp_path / "ids.txt"
        path.write_text("\ufeff30\n\n 10.jpg \n", encoding="utf-8")
        assert read_image_ids(path) == [30, "10.jpg"]
        with pytest.raises(FileNotFoundError, match=r"data\.image_ids names .*gone\.txt"):
            read_image_ids(tmp_path / "gone.txt")
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="is no text"):
            read_image_ids(path)

    @pytest.mark.parametrize(
        ("image_ids", "limit", "message"),
        [
            ([10, 11], None, "names 1 ids that no image has: 11. Nearest to 11: 10 and 20"),
            ([1, 2, 3, 4, 5, 6], None, r"names 6 ids that no image has: 1, 2, 3, 4, 5, \.\.\.\. Nearest to 1: 10"),
            ([99], None, "Nearest to 99: 30"),
            ([], None, r"data\.image_ids is empty"),
            (None, 0, r"data\.limit is 0"),
            (None, -3, r"data\.limit is -3"),
        ],
    )
    def test_refusals(self, image_ids: list[int] | None, limit: int | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            select(self.records, image_ids, limit)


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

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_folders_get_one_id_a_file(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        stems = st.sampled_from(["1", "2", "03", "a", "b", "c", "sub/1", "sub/d", "10", "1234567890123"])
        names = [f"{stem}.png" for stem in data.draw(st.lists(stems, min_size=1, max_size=5, unique=True))]
        folder = tmp_path_factory.mktemp("folder")
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        known = data.draw(st.lists(stems, max_size=4, unique=True))
        try:
            first = {record.file_name: record.image_id for record, _ in read_folder(folder)[1]}
            numbers = {f"{stem}.png": first.get(f"{stem}.png", 500 + n) for n, stem in enumerate(known)}
            _, failures = read_folder(folder, numbers)
        except ValueError as error:
            assert "both have the id" in str(error)  # noqa: PT017
            return
        again = {record.file_name: record.image_id for record, _ in failures}
        assert sorted(again) == sorted(names)
        assert len(set(again.values())) == len(names)
        assert all(again[name] == number for name, number in numbers.items() if name in again)
