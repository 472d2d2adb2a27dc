"""An object store that refuses: one clear error."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from coco_factory import Coco
from ran import RunCLI

pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")

from detr_lightning import EmbeddingStore

URL = "s3://bucket/out"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests to a server that refuses them all, which the environment names."""
    seen: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.command} {self.path}")
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield seen
        server.shutdown()


def test_a_refusal_is_one_clear_error(run_cli: RunCLI, coco_folder: Coco, requests: list[str]) -> None:
    message = f"{URL}: the server refuses access (403 Forbidden). Check AWS_ACCESS_KEY_ID"
    with pytest.raises(OSError, match="refuses access") as raised:
        EmbeddingStore(URL)
    assert str(raised.value).startswith(message)
    for words in (
        ("verify", URL),
        ("predict", *coco_folder.data, "--writer.layout", "lance", "--output_dir", URL, "--data.num_workers", "0"),
    ):
        requests.clear()
        ran = run_cli(*words)
        assert ran.code == 1
        assert message in ran.out + ran.err
        assert "Traceback" not in ran.err
        assert 1 <= len(requests) <= 10  # Lance tries a listing a few times.
