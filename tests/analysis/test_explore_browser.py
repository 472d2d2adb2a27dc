"""`explore` in a real browser: Debian's chromium, driven by Playwright. Skipped where one of the two is missing."""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from store_factory import annotations_of, make_store

from detr_lightning.analysis.objects import objects
from detr_lightning.store import EmbeddingStore

CHROMIUM = shutil.which("chromium")
_MISSING = [
    *(name for name in ("embedding_atlas", "playwright") if importlib.util.find_spec(name) is None),
    *([] if CHROMIUM else ["chromium"]),
]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}"),
    pytest.mark.endurance,
    pytest.mark.filterwarnings("default"),
]
WAIT = 120_000
"""Milliseconds for the page and its database engine to start on a busy machine."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    folder = tmp_path_factory.mktemp("browser")
    content = annotations_of(8)
    (folder / "images").mkdir()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"]), "red").save(folder / "images" / image["file_name"])
    return make_store(folder / "store", content, image_dir=folder / "images")


def command(store: EmbeddingStore, *words: str) -> list[str]:
    return [sys.executable, "-m", "detr_lightning", "explore", str(store.folder), *words]


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[Any, list[str]]]:
    """Open a page, and yield it with the addresses that it asked for."""
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(url, timeout=WAIT)
        yield page, asked
        browser.close()


def check(url: str, store: EmbeddingStore, thumbnails: bool) -> None:
    """Check what the page shows, and that it asks nobody else for anything."""
    table = objects(store)
    with opened(url) as (page, asked):
        page.get_by_text(f"{len(table)} points").first.wait_for(timeout=WAIT)
        for name, number in table.category.value_counts().items():  # The chart has them in lines of their own.
            page.wait_for_function(f"/\\n{name}\\s+{number}\\s/.test(document.body.innerText)", timeout=WAIT)
        pictures = "[...document.images].filter(image => image.src.startsWith('data:image/jpeg') && image.naturalWidth)"
        if thumbnails:
            page.wait_for_function(f"{pictures}.length > 0", timeout=WAIT)
            sizes = page.evaluate(f"{pictures}.map(image => [image.naturalWidth, image.naturalHeight])")
            assert set(map(tuple, sizes)) == {(96, 96)}
        else:
            page.wait_for_timeout(2000)
            assert page.evaluate(f"{pictures}.length") == 0
        assert elsewhere(asked, url) == []
        # What would have been seen, from the page and from its workers.
        fetch = "fetch('http://elsewhere.invalid/%s').catch(() => 0)"
        page.evaluate(fetch % "page")
        work = f"{fetch % 'worker'}.then(() => postMessage(0))"
        page.evaluate(
            f"new Promise(done => new Worker('data:text/javascript,' + encodeURIComponent(`{work}`)).onmessage = done)"
        )
        assert elsewhere(asked, url) == [f"http://elsewhere.invalid/{name}" for name in ("page", "worker")]


def elsewhere(asked: list[str], url: str) -> list[str]:
    assert asked[0] == url
    return [other for other in asked if not other.startswith((url, url.replace("http:", "ws:"), "data:", "blob:"))]


@pytest.mark.parametrize("thumbnails", [True, False])
def test_a_static_page(store: EmbeddingStore, tmp_path: Path, thumbnails: bool) -> None:
    images = store.image_path(store.image_ids[0]).parent
    moved = images.with_name("moved")
    if not thumbnails:
        images.rename(moved)
    try:
        done = subprocess.run(
            command(store, "--export", str(tmp_path / "page")), capture_output=True, text=True, check=False
        )
    finally:
        if moved.exists():
            moved.rename(images)
    assert done.returncode == 0, done.stderr
    assert ("No thumbnails" in done.stdout) != thumbnails
    handler = functools.partial(_Quiet, directory=tmp_path / "page")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        check(f"http://127.0.0.1:{server.server_port}/", store, thumbnails)
        server.shutdown()
        thread.join()


def test_the_server(store: EmbeddingStore) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(command(store, "--port", str(port)), start_new_session=True) as server:
        try:
            while not listens(port):
                assert server.poll() is None
                time.sleep(0.2)
            check(f"http://localhost:{port}/", store, thumbnails=True)
        finally:
            os.killpg(server.pid, signal.SIGINT)
        assert server.wait(60) == 0


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
