"""Downloads, from a server on this machine."""

from __future__ import annotations

import gc
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from detr_lightning.model import checkpoints
from detr_lightning.model.detr import DETR, Architecture, official
from detr_lightning.model.detr.official import OFFICIAL, Official

NAME = "detr_resnet50_dc5"
FILE = "detr-r50-dc5-f0fb7ef5.pth"


class Server(ThreadingHTTPServer):
    """Answers every request in one way, and counts them."""

    content = b""
    behaviour = "good"
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.behaviour == "missing":
            return self.send_error(404)
        content = self.server.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.behaviour == "slow":
            time.sleep(0.2)
        if self.server.behaviour == "wrong":
            content = content[::-1]
        elif self.server.behaviour in ("cut off", "stalled"):
            content = content[: len(content) // 2]
        self.wfile.write(content)
        if self.server.behaviour == "stalled":
            time.sleep(1)
        return None

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / FILE
    model = DETR(Architecture("bottleneck", (1, 1, 1, 1), 32, 8, 1, 1, 48, 5, 7)).bfloat16()
    torch.save({"model": model.state_dict()}, path)
    return path.read_bytes()


@pytest.fixture
def server(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(OFFICIAL, NAME, Official(FILE, hashlib.sha256(content).hexdigest()[:8], dilation=True))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = content
        monkeypatch.setattr(official, "BASE_URL", f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "checkpoints"


def test_a_good_file_is_fetched_once(server: Server, cache: Path, content: bytes) -> None:
    first = checkpoints.load(NAME)
    assert first.name == NAME
    assert first.sha256 == hashlib.sha256(content).hexdigest()
    assert first.notes == "DETR-R14-DC5: 8 heads (official), dilated (official)"
    assert [file.name for file in cache.iterdir()] == [FILE]
    assert checkpoints.load(NAME).sha256 == first.sha256
    assert server.requests == 1
    with pytest.raises(ValueError, match=rf"model.dilation is False, but {NAME} has dilation True \(official\)"):
        checkpoints.load(NAME, dilation=False)


def test_those_who_want_it_at_once_wait_for_the_first(server: Server) -> None:
    server.behaviour = "slow"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: official.fetch(OFFICIAL[NAME]), range(3)))
    assert len(set(found)) == 1
    assert server.requests == 1


# torch 2.6 leaves the connection to Python to close when it times out.
UNCLOSED = pytest.mark.filterwarnings("ignore:.*<socket:pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("wrong", "hash"),
        ("missing", "404"),
        ("cut off", "hash|IncompleteRead"),
        pytest.param("stalled", "timed out", marks=UNCLOSED),
    ],
)
def test_failures_leave_nothing_behind(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, reason: str
) -> None:
    monkeypatch.setattr(official, "STALLED_AFTER", 0.2)
    server.behaviour = behaviour
    with pytest.raises(ConnectionError, match=rf"{FILE} could not be downloaded: .*({reason}).*") as error:
        checkpoints.load(NAME)
    assert f"download the file to {cache / FILE} yourself" in str(error.value)
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # urllib's
def test_no_network(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(official, "BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(ConnectionError, match=r"Connection refused.* Check the network, or download the file to"):
            checkpoints.load(NAME)
    gc.collect()  # the socket goes now, not in a later test
    assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_replaced(server: Server, cache: Path, content: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(content[:-1])
    server.behaviour = "missing"
    with pytest.raises(ConnectionError, match=r"404.*The existing file is damaged"):
        checkpoints.load(NAME)
    server.behaviour = "good"
    checkpoints.load(NAME)
    assert (cache / FILE).read_bytes() == content


def test_the_table_is_consistent() -> None:
    for name, checkpoint in OFFICIAL.items():
        assert checkpoint.file.endswith(f"-{checkpoint.sha256_prefix}.pth")
        assert checkpoint.dilation == ("dc5" in name) == ("dc5" in checkpoint.file)
        assert ("panoptic" in name) == ("panoptic" in checkpoint.file)
        assert ("101" in name) == ("101" in checkpoint.file)
