"""transformers.js runs an exported folder in Node, and in a browser where there is Chromium, with clipmb's results.

`make clients` installs it where there is npm, into ``build/javascript``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import clipmb

HERE = Path(__file__).parent
INSTALLED = Path(os.environ.get("CLIPMB_JAVASCRIPT", HERE.parents[2] / "build/javascript"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HANG = 600  # seconds
PICTURES = 10


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as a server has it: the exported model, the page, and transformers.js."""
    folder = tmp_path_factory.mktemp("site")
    clipmb.export(clipmb.small_model(), folder / "models/exported")
    for name in ("classify.mjs", "node.mjs", "page.html", "package.json"):
        shutil.copy(HERE / name, folder)
    (folder / "node_modules").symlink_to(INSTALLED / "node_modules")
    return folder


@pytest.fixture(scope="module")
def expected(site):
    """Writes what is asked; returns what clipmb answers."""
    model = clipmb.small_model()
    pictures, labels = (part[:PICTURES] for part in clipmb.held_out_pictures())
    prompts = [f"a picture of {label}" for label in labels]
    processor = clipmb.CLIPProcessor.from_pretrained(model)
    inputs = processor(prompts, pictures, return_tensors="np", padding=True)
    pixels = inputs["pixel_values"]
    pipeline = clipmb.CLIPPipeline.from_pretrained(model)
    chances = pipeline.classify(pictures, labels, "This is a photo of {}")  # as transformers.js asks
    clear = int(chances.max(1).argmax())
    shown = pictures[clear]
    image = {"width": shown.width, "height": shown.height, "pixels": list(shown.tobytes())}
    given = {
        "prompts": prompts,
        "pixels": pixels.ravel().tolist(),
        "shape": pixels.shape,
        "image": image,
        "labels": labels,
    }
    (site / "given.json").write_text(json.dumps(given))
    return {
        "ids": inputs["input_ids"].tolist(),
        "probabilities": pipeline.classify(pictures, labels, "a picture of {}"),
        "best": labels[int(chances[clear].argmax())],
    }


def assert_agrees(found, expected):
    assert "error" not in found, found["error"]
    assert found["ids"] == expected["ids"]
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-4)
    assert found["best"] == expected["best"]


def test_node(site, expected):
    command = ["node", site / "node.mjs", f"{site / 'models'}/", site / "given.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert_agrees(json.loads(done.stdout.splitlines()[-1]), expected)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_browser(site, expected, tmp_path):
    answered, results = threading.Event(), []

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self):
            results.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            answered.set()

        def log_message(self, *args):
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
             f"http://127.0.0.1:{server.server_port}/page.html"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert answered.wait(HANG)
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    assert_agrees(results[0], expected)
