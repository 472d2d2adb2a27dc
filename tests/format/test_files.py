from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr_lightning.format import files, names
from detr_lightning.format.archive import WholeFiles


def test_names_and_ids() -> None:
    assert names.file_name(1) == "embedding_000000000001.pt"
    assert names.file_name(10**12 - 1) == "embedding_999999999999.pt"
    assert names.image_id_of("embedding_000000000139.pt") == 139
    for name in ("embedding_139.pt", "embedding_000000000139.pt.tmp", "embedding_٠٠٠٠٠٠٠٠٠١٣٩.pt", "metadata.json"):
        assert names.image_id_of(name) is None


@pytest.mark.parametrize("image_id", [-1, 10**12, 1.0, "1", True, None])
def test_ids_that_cannot_name_a_file(image_id: object) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        names.file_name(image_id)


def test_tensors_come_back_and_own_exactly_their_storage(tmp_path: Path) -> None:
    batch = torch.randn(4, 6, 10, 16, requires_grad=True)
    image = batch[1]
    tensors = {
        "decoder_output": image,
        "query_embeddings": image[-1],
        "again": image,
        "turned": torch.randn(3, 5).T,
        "half": torch.randn(3).half(),
    }
    size = files.save_tensors(tmp_path, 7, tensors).bytes
    path = tmp_path / names.file_name(7)
    assert path.stat().st_size == size
    read = torch.load(path)
    assert list(read) == list(tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == len(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(read[key], tensor)
        assert read[key].dtype == tensor.dtype
        assert read[key].is_contiguous()
        assert not read[key].requires_grad
        assert read[key].untyped_storage().nbytes() == tensor.nbytes
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_inference_tensors_are_written(tmp_path: Path) -> None:
    with torch.inference_mode():
        files.save_tensors(tmp_path, 7, {"query_embeddings": torch.ones(2, 3)[0]})
    assert torch.load(tmp_path / names.file_name(7))["query_embeddings"].tolist() == [1, 1, 1]


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.save_tensors(tmp_path, 7, {"a": torch.ones(1)})
        files.write_json(tmp_path / names.METADATA, {"a": 1})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_full_disk_names_the_path_and_the_bytes_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys, pathlib, torch; from detr_lightning.format import files, names\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: files.save_tensors(pathlib.Path(sys.argv[1]), 7, {'a': torch.ones(100_000)})\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "embedding_000000000007.pt needs about 401" in done.stdout
    assert "free" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metadata.json"
    files.write_json(path, {"a": 1})

    def interrupt(handle: int) -> None:
        assert len(list(tmp_path.glob(names.TEMPORARY))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.glob(".*")) == []


def test_json_is_read_back_and_has_a_line_for_each_image(tmp_path: Path) -> None:
    content = {
        "image_ids": [1, 2],
        "images": [{"id": 1, "file_name": "a\n\udce9.jpg"}, {"id": 2, "file_name": 'b"}, {.jpg'}],
        "failed": [],
        "config": {"data": {"limit": None}, "empty": {}},
    }
    files.write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content
    assert text.splitlines()[1] == '  "image_ids": [1, 2],'
    assert len(text.splitlines()) == 14
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == content


def test_whole_files(tmp_path: Path) -> None:
    size = files.save_tensors(tmp_path, 7, {"a": torch.ones(1000)}).bytes
    path = tmp_path / names.file_name(7)
    assert WholeFiles().is_whole(path, size)
    assert not WholeFiles().is_whole(path, size + 1)
    assert not WholeFiles().is_whole(tmp_path / names.file_name(8), size)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert not WholeFiles().is_whole(path, size)
    path.write_bytes(b"x" * size)
    assert not WholeFiles().is_whole(path, size)
    assert not WholeFiles().is_whole(tmp_path, tmp_path.stat().st_size)


def test_the_folder_is_synced(tmp_path: Path) -> None:
    files.fsync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.fsync_folder(tmp_path / "none")
