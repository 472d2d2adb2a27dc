"""Make the README's picture of `explore`: a browser looks at the demo.

    pip install -e ".[explore]" playwright && python tools/explorer_picture.py

writes assets/readme/explorer.png. Chromium must be installed. The map is folded away: it needs WebGPU with half
precision, which a browser without a graphics card does not have.
"""

from __future__ import annotations

import functools
import http.server
import io
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from playwright.sync_api import sync_playwright

from detr_lightning import extract
from detr_lightning.command.main import main
from detr_lightning.demo import demo
from tools.readme_pictures import ROOT, write


def explorer(page_folder: Path) -> Image.Image:
    """Return what a browser shows of an exported page."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(page_folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 540})
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("img[src^='data:image/jpeg']").first.wait_for()
        page.mouse.click(920, 20)  # Folds the map away.
        page.wait_for_timeout(3000)
        picture = page.screenshot()
        browser.close()
    server.shutdown()
    return Image.open(io.BytesIO(picture)).convert("RGB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        settings = demo() | {"output_dir": Path(folder) / "demo_output"}
        extract(**settings)
        verb = ["explore", str(settings["output_dir"]), "--annotations", str(settings["annotation_file"])]
        assert main([*verb, "--export", str(Path(folder) / "page")]) == 0
        write(explorer(Path(folder) / "page"), ROOT / "assets/readme/explorer.png")
