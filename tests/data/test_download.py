"""COCO's download, against a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from detr_lightning.data import download


class Server:
    """Serves bytes by path, and can break off after a number of them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: int | None = None
        self.ranges: list[str | None] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.ranges.append(wanted)
                if self.path not in server.files:
                    self.send_error(404)
                    return
                content = server.files[self.path]
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start : server.break_after])

            def log_message(self, *_: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, data in files.items():
            content.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    images = archive({"val2017/000000000001.jpg": b"one", "val2017/000000000002.jpg": b"two" * 5000})
    annotations = archive({"annotations/instances_val2017.json": json.dumps({"images": []}).encode()})
    monkeypatch.setattr(download, "BASE_URL", f"http://127.0.0.1:{server.http.server_port}/")
    for name, data in (("IMAGES", images), ("ANNOTATIONS", annotations)):
        known = getattr(download, name)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        monkeypatch.setattr(download, name, download.Archive(known.url, len(data), md5, known.members))
        server.files["/" + known.url] = data
    yield server
    server.http.shutdown()
    server.http.server_close()


def fetch(folder: Path) -> None:
    download.download_val2017(folder / "val2017", folder / "annotations" / "instances_val2017.json")


def test_what_is_missing_is_fetched_and_unpacked(server: Server, tmp_path: Path) -> None:
    fetch(tmp_path)
    assert (tmp_path / "val2017" / "000000000001.jpg").read_bytes() == b"one"
    assert json.loads((tmp_path / "annotations" / "instances_val2017.json").read_text()) == {"images": []}
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert found - {".download.lock", "annotations/.download.lock"} == {
        "val2017/000000000001.jpg",
        "val2017/000000000002.jpg",
        "annotations/instances_val2017.json",
    }
    asked = len(server.ranges)
    fetch(tmp_path)
    assert len(server.ranges) == asked


def test_a_download_that_was_cut_off_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.break_after = 120
    with pytest.raises(ConnectionError, match="Run the same command again"):
        fetch(tmp_path)
    server.break_after = None
    fetch(tmp_path)
    assert (tmp_path / "val2017" / "000000000002.jpg").read_bytes() == b"two" * 5000
    assert "bytes=120-" in server.ranges


def test_a_wrong_file_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    path = "/" + download.IMAGES.url
    server.files[path] = bytes(len(server.files[path]))
    with pytest.raises(ValueError, match="md5"):
        fetch(tmp_path)
    assert not (tmp_path / "val2017").exists()
    assert not list(tmp_path.rglob("*.zip"))


def test_no_such_file_and_no_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files.clear()
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*Not Found"):
        fetch(tmp_path)
    monkeypatch.setattr(download, "BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        fetch(tmp_path)
