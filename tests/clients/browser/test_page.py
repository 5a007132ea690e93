"""The server's page in headless Chromium: what it finds, shows and loads, by keyboard, narrow and in the dark.

`make clients` runs it where there is Chromium. With ``CLIPMB_SCREENSHOTS=docs/images`` it draws the pictures of
docs/serving.md again.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import HANG, excerpt, start

import clipmb

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("CLIPMB_SCREENSHOTS")
STRANGE = "<img src=x onerror=\"document.title='taken'\">"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")


class Page:
    """A page in a browser of its own, which is told what to do through a pipe, by the DevTools protocol."""

    def __init__(self, profile, width=1000, height=700, scheme="light"):
        (told, self._told), (self._said, said) = os.pipe(), os.pipe()
        options = (
            "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --hide-scrollbars --no-first-run "
            f"--disable-background-networking --user-data-dir={profile} about:blank"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {CHROMIUM} {options} 3<&{told} 4>&{said}"], pass_fds=(told, said),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(told)
        os.close(said)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._told)
        os.close(self._said)

    def call(self, method, **params):
        """Calls a method and returns its result; events that come meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._told, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._said, 1 << 16)
                assert part, "Chromium has ended"
                self._rest += part
            content, _, self._rest = self._rest.partition(b"\0")
            told = json.loads(content)
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    def run(self, script):
        """Returns the value of an expression."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, script):
        """Waits until an expression is true."""
        end = time.monotonic() + HANG / 30
        while not self.run(script):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.02)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def type(self, name, text):
        """Types into a field, in place of what is there."""
        self.run(f"document.getElementById('{name}').focus(); document.getElementById('{name}').value = ''")
        self.call("Input.insertText", text=text)

    def press(self, key, code):
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def choose(self, path):
        """Chooses a file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def shot(self, name, colours=64):
        """Takes a picture of the page; writes it where the documentation is drawn again."""
        content = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        image = Image.open(io.BytesIO(content))
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100  # there is something on it
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(exist_ok=True, parents=True)
            image.convert("RGB").quantize(colours).save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)

    def told(self, method):
        return [event["params"] for event in self.events if event["method"] == method]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of embeddings, and the file of a picture that is in it."""
    folder = tmp_path_factory.mktemp("page")
    pictures, labels = clipmb.held_out_pictures()
    rows = []
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        picture.save(folder / f"{label} {number}.png".replace("/", " "))
        rows.append({"image": f"{label} {number}.png".replace("/", " "), "caption": label})
    rows[0]["caption"] = STRANGE
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    clipmb.embed(folder / "captions.jsonl", folder / "out", model=clipmb.small_model())
    return folder / "out", folder / f"rocket {labels.index('rocket')}.png"


@pytest.fixture(scope="module", params=[None, "a-secret"], ids=["open", "token"])
def server(request, data):
    options = ["--token", request.param] if request.param else []
    process = start("-m", "clipmb", "serve", data[0], "--port", "0", "--name", "emoji", *options)
    line = process.stdout.readline().strip()
    assert "http://" in line, excerpt(process.stderr.read())
    yield line.rpartition(" ")[2], request.param
    process.terminate()
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, "")


def opened(page, server):
    url, token = server
    page.open(url)
    if token:
        page.until("!document.getElementById('login').hidden")
        assert page.run("document.activeElement.id") == "token"
        page.call("Input.insertText", text=token)
        page.press("Enter", 13)
    page.until("!document.getElementById('search').hidden")
    assert page.run("document.getElementById('login').hidden")


def test_search_classify_and_what_is_loaded(server, data, tmp_path):
    with Page(tmp_path) as page:
        opened(page, server)
        assert page.run("document.getElementById('about').textContent") == "emoji · 360 images · 360 texts"
        page.type("query", "an emoji of a rocket")
        page.press("Enter", 13)
        page.until("document.querySelectorAll('#results li').length == 24")
        page.until("[...document.querySelectorAll('#results img')].every(image => image.naturalWidth)")
        found = page.run("[...document.querySelectorAll('#results li p:last-child')].map(one => one.textContent)")
        assert found == [hit["id"] for hit in clipmb.Index.open(data[0]).search("an emoji of a rocket", k=24)]
        page.choose(data[1])
        page.until(f"document.getElementById('results').innerText.includes('{data[1].name}')")
        page.type("labels", "panda, rocket\npizza, rocket")
        page.type("template", "an emoji of {}")
        page.press("Enter", 13)
        page.until("document.querySelectorAll('#bars li').length == 3")
        assert page.run("document.querySelector('#bars li span span').textContent") == "rocket"
        assert page.run("document.querySelector('#bars progress').value") > 0.9
        page.until("[...document.querySelectorAll('#results img')].every(image => image.naturalWidth)")
        page.run("window.scrollTo(0, 0)")
        page.shot("serving-wide")
        requests = {event["request"]["url"] for event in page.told("Network.requestWillBeSent")}
        assert f"{server[0]}/thumbnail/images/0" not in requests
        own = (f"{server[0]}/", f"blob:{server[0]}/", "data:image/")
        assert all(url.startswith(own) for url in requests), requests
        wrong = [event["entry"]["text"] for event in page.told("Log.entryAdded")]
        assert not [text for text in wrong if "401" not in text and "favicon" not in text], wrong
        assert not page.told("Runtime.exceptionThrown")


def test_captions_are_text_and_errors_are_told(server, tmp_path):
    with Page(tmp_path) as page:
        opened(page, server)
        page.run("document.getElementById('kind').value = 'texts'")
        page.type("query", STRANGE)
        page.press("Enter", 13)
        page.until("document.querySelectorAll('#results li').length == 24")
        assert STRANGE in page.run("document.getElementById('results').innerText")
        assert page.run("document.title") == "clipmb: emoji"
        page.run("document.getElementById('query').value = ''")
        page.run("document.getElementById('search').requestSubmit()")
        page.until("document.getElementById('status').classList.contains('bad')")
        assert "Type what to find" in page.run("document.getElementById('status').textContent")
        page.run("""(() => {
            const data = new DataTransfer();
            data.items.add(new File(["no picture"], "broken.png", {type: "image/png"}));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        })()""")
        page.until("document.getElementById('status').textContent.includes('readable image')")


ANSWERS = [
    (429, {"error": {"message": "The queue is full."}}, "The queue is full."), (503, None, "The server answered 503."),
    (502, "Bad gateway", "The server answered 502."), (400, {"error": "a text"}, "The server answered 400."),
    (None, None, "The server does not answer. Is it running?"),
]  # fmt: skip


def test_whatever_a_server_or_proxy_answers_is_told(server, tmp_path):
    with Page(tmp_path) as page:
        opened(page, server)
        page.type("query", "a")
        for status, content, told in ANSWERS:
            answer = f"new Response({json.dumps(json.dumps(content))}, {{status: {status}}})"
            given = f"resolve({answer})" if status else "reject(new TypeError('Failed to fetch'))"
            page.run(f"window.fetch = () => Promise.{given}; say('')")
            page.run("document.getElementById('search').requestSubmit()")
            page.until("document.getElementById('status').classList.contains('bad')")
            assert page.run("document.getElementById('status').textContent") == told


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(server, tmp_path, scheme):
    with Page(tmp_path, scheme=scheme) as page:
        opened(page, server)
        for name, part, colour, least in (
            ("query", "'::placeholder'", "color", 4.5), ("query", "null", "borderColor", 3),
            ("query", "null", "color", 4.5), ("status", "null", "color", 4.5),
        ):  # fmt: skip
            page.run("say('wrong', true)")
            style = f"getComputedStyle(document.getElementById('{name}'), {part})"
            over, under, opacity = page.run(
                f"[{style}.{colour}, getComputedStyle(document.body).backgroundColor, {style}.opacity]"
            )
            (*seen, alpha), below = channels(over), channels(under)[:3]
            share = alpha * float(opacity)
            mixed = [share * a + (1 - share) * b for a, b in zip(seen, below, strict=True)]
            low, high = sorted((luminance(mixed), luminance(below)))
            assert (high + 0.05) / (low + 0.05) >= least, (name, part, colour)


def channels(colour):
    """Red, green, blue and opacity of what a browser calls a colour."""
    numbers = [float(one) for one in colour[colour.index("(") + 1 : -1].split(",")]
    return [*numbers, 1.0][:4]


def luminance(colour):
    """Relative luminance, as WCAG 2 defines it."""
    linear = [one / 255 / 12.92 if one <= 10 else ((one / 255 + 0.055) / 1.055) ** 2.4 for one in colour]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_a_picture_can_be_dropped(server, data, tmp_path):
    content = base64.b64encode(data[1].read_bytes()).decode()
    with Page(tmp_path) as page:
        opened(page, server)
        page.run(f"""(() => {{
            const bytes = Uint8Array.from(atob("{content}"), (one) => one.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "rocket.png", {{type: "image/png"}}));
            document.body.dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}}));
        }})()""")
        page.until("document.querySelectorAll('#results li').length == 24")
        assert page.run("document.querySelector('#results .score').textContent") == "1.000"
        assert page.run("document.querySelector('#results li p:last-child').textContent") == data[1].name


def test_everything_is_reached_by_the_keyboard(server, tmp_path):
    with Page(tmp_path) as page:
        opened(page, server)
        page.run("document.activeElement.blur()")
        reached = []
        for _ in range(12):
            page.press("Tab", 9)
            reached.append(page.run("document.activeElement.id || document.activeElement.textContent"))
        order = ["query", "kind", "number", "Search", "file", "labels", "template", "Compare"]
        start_at = reached.index("query")
        assert (reached[start_at:] + reached[:start_at])[:8] == order
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        page.run("document.activeElement.blur()")
        page.press("Tab", 9)
        assert page.run(outline) == "solid"
        fields = "[...document.querySelectorAll('input:not([hidden]), select, textarea')]"
        assert page.run(f"{fields}.every(one => one.labels.length)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_dark_colours(server, data, tmp_path, scheme):
    with Page(tmp_path, width=360, height=740, scheme=scheme) as page:
        opened(page, server)
        page.type("query", "an emoji of a panda")
        page.press("Enter", 13)
        page.until("document.querySelectorAll('#results li').length == 24")
        page.until("[...document.querySelectorAll('#results img')].every(image => image.naturalWidth)")
        assert page.run("document.documentElement.scrollWidth") <= 360
        colour = page.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(", "))) < 200) == (scheme == "dark")
        page.run("document.activeElement.blur(); window.scrollTo(0, 0)")
        if scheme == "dark":
            page.shot("serving-narrow")
        page.choose(data[1])
        page.type("labels", "a very long label " * 5 + "\nrocket")
        page.run("document.getElementById('classify').requestSubmit()")
        page.until("document.querySelectorAll('#bars li').length == 2")
        assert page.run("document.documentElement.scrollWidth") <= 360
