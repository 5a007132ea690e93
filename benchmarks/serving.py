"""The server under load: right answers, none lost, memory, latency, and its throughput beside the bulk path.

First some minutes of mixed load by 64 clients, of whose requests 5 % are wrong, on a server in a process of its own
with the small model and an index: every answer is compared with `CLIPPipeline`'s. Then images and texts alone, with the
small model and with one of ViT-B/32's size, in alternation with the bulk path on the same files: `clipmb.embed` and
`CLIPPipeline.encode_text`. The clients take their share of the processors; the column of that name compares the
processors' time of the server alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _checkpoint import vit_b_32
from _compare import row
from image_processor import photos

import clipmb
from clipmb.embedding.passport import passport_of

CLIENTS, ROUNDS = 64, 3
TOLERANCE = 2e-6
LABELS = ["cat", "dog", "rocket", "panda", "pizza"]


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[tuple[int, int]]:
    """Runs ``clipmb serve``; yields its process and port."""
    command = [sys.executable, "-m", "clipmb", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r":(\d+)$", line.strip())
        if found is None:
            sys.exit(f"The server did not start: {line}")
        try:
            yield process.pid, int(found[1])
        finally:
            process.terminate()
            if process.wait() != 0:
                sys.exit(f"The server ended with {process.returncode}.")


class Connection:
    """A client that keeps its connection; as little code between two requests as can be."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Returns the status and the body of the answer."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        content = await reader.readexactly(int(length[1]) if length else 0)
        if b"\r\nconnection: close" in head.lower():
            self.close()
        return int(head.split(b" ", 2)[1]), content

    def close(self) -> None:
        """Ends the connection."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def embedding_request(field: dict[str, Any]) -> bytes:
    return json.dumps({"encoding_format": "base64", **field}).encode()


def vectors(content: bytes) -> np.ndarray:
    return np.array([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in json.loads(content)["data"]])


class Load:
    """What clients ask, and what has to be answered.

    Args:
        pipeline: What computes the answers beforehand.
        index: What is searched.
    """

    def __init__(self, pipeline: clipmb.CLIPPipeline, index: clipmb.Index) -> None:
        pictures, names = clipmb.held_out_pictures()
        self.pictures, self.uris = pictures, []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            self.uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        self.texts = [text for name in names for text in (name, f"an emoji of a {name}", f"a {name} " * 4)]
        self.images, self.words = (
            pipeline.encode_image(pictures),
            pipeline.encode_text(self.texts, long_text="truncate"),
        )
        self.chances = pipeline.classify(pictures, LABELS)
        self.found = [[hit["id"] for hit in index.search(text, k=5)] for text in self.texts[:100]]

    def request(self, chance: random.Random) -> tuple[str, str, str, bytes, Any]:
        """Returns a kind, a method, a path, a body, and what checks the answer: a status, or a function."""
        kind = chance.random()
        if kind < 0.05:
            return self.wrong(chance)
        if kind < 0.10:
            place = chance.randrange(len(self.found))
            body = json.dumps({"text": self.texts[place], "k": 5}).encode()
            expected = self.found[place]
            return "search", "POST", "/search", body, lambda content: ids(content) == expected
        if kind < 0.15:
            place = chance.randrange(len(self.uris))
            body = json.dumps({"images": self.uris[place], "labels": LABELS}).encode()
            expected = self.chances[place]

            def classified(content: bytes) -> bool:
                got = json.loads(content)["results"][0]["probabilities"]
                return bool(np.allclose(got, expected, rtol=1e-3, atol=1e-5))

            return "classify", "POST", "/classify", body, classified
        if kind < 0.55:
            places = [chance.randrange(len(self.texts)) for _ in range(chance.randint(1, 8))]
            body = embedding_request({"input": [self.texts[place] for place in places]})
            return "texts", "POST", "/v1/embeddings", body, lambda content: near(content, self.words[places])
        places = [chance.randrange(len(self.uris)) for _ in range(chance.randint(1, 4))]
        body = embedding_request({"input": [self.uris[place] for place in places], "modality": "image"})
        return "images", "POST", "/v1/embeddings", body, lambda content: near(content, self.images[places])

    def wrong(self, chance: random.Random) -> tuple[str, str, str, bytes, Any]:
        """Returns a request with something wrong, and the status that it has to get."""
        good = chance.choice(self.uris)
        cut = good[: len(good) // 8 * 4]
        method, path, body, status = chance.choice([
            ("POST", "/v1/embeddings", b"{", 400),
            ("POST", "/v1/embeddings", embedding_request({"input": [good, cut], "modality": "image"}), 400),
            ("POST", "/v1/embeddings", embedding_request({"input": ["data:,nothing"], "modality": "image"}), 400),
            ("POST", "/v1/embeddings", embedding_request({"input": [1, 2]}), 400),
            ("POST", "/v1/embeddings", embedding_request({"input": "a", "model": "another"}), 404),
            ("POST", "/v1/embeddings", embedding_request({"input": "a" * (3 << 20)}), 413),
            ("GET", "/search?q=a&k=0", b"", 400),
            ("GET", "/nowhere", b"", 404),
            ("GET", "/classify", b"", 405),
        ])  # fmt: skip
        return "wrong", method, path, body, status


def ids(content: bytes) -> list[str]:
    return [hit["id"] for hit in json.loads(content)["results"]]


def near(content: bytes, expected: np.ndarray) -> bool:
    """Whether these are the embeddings, to rounding."""
    got = vectors(content)
    return got.shape == expected.shape and bool(np.abs(got - expected).max() < TOLERANCE)


def memory(process: int) -> float:
    """Returns the resident memory of a process in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024


def computed(process: int) -> float:
    """Returns the seconds that the processors have worked for a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def soak(load: Load, process: int, port: int, minutes: float) -> None:
    """Asks for some minutes; prints counts, latencies and memory."""
    end = time.monotonic() + 60 * minutes
    counts, wrong, seconds, used = Counter(), [], {}, []

    async def client(number: int) -> None:
        chance, connection = random.Random(number), Connection(port)
        while time.monotonic() < end:
            kind, method, path, body, expected = load.request(chance)
            counts["sent"] += 1
            begun = time.perf_counter()
            status, content = await connection.ask(method, path, body)
            seconds.setdefault(kind, []).append(time.perf_counter() - begun)
            counts["answered"] += 1
            counts[f"status {status}"] += 1
            right = status == expected if isinstance(expected, int) else status == 200 and expected(content)
            if not right:
                wrong.append((kind, status, content[:200]))
        connection.close()

    async def watch() -> None:
        while time.monotonic() < end:
            used.append(memory(process))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(number) for number in range(CLIENTS)))
    row(
        f"{minutes:g} minutes, {CLIENTS} clients",
        "load",
        **{name: f"{count:,}" for name, count in sorted(counts.items())},
    )
    row("wrong answers", "load", count=str(len(wrong)), lost=str(counts["sent"] - counts["answered"]))
    for kind, times in sorted(seconds.items()):
        shown = {f"p{p}": f"{1000 * float(np.percentile(times, p)):.0f} ms" for p in (50, 90, 99)}
        row(kind, "latency", **shown, max=f"{1000 * max(times):.0f} ms")
    tenths = [f"{statistics.median(part):.0f}" for part in np.array_split(used, 10) if len(part)]
    row("resident memory, medians of tenths of the time", "memory", MiB=" ".join(tenths))
    if wrong or counts["sent"] != counts["answered"]:
        sys.exit(f"wrong answers: {wrong[:5]}")


async def drain(port: int, bodies: list[bytes], count: int) -> float:
    """Sends requests of these bodies with all clients; returns the seconds."""
    left = iter(range(count))

    async def client() -> None:
        connection = Connection(port)
        for number in left:
            status, content = await connection.ask("POST", "/v1/embeddings", bodies[number % len(bodies)])
            if status != 200:
                sys.exit(f"status {status}: {content[:200]!r}")
        connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - begun


def throughput(
    name: str, model: str, files: list[bytes], texts: list[str], backend: str | None, seconds: float
) -> None:
    """Compares the server with the pipeline, on images and on texts, by requests of one and of eight."""
    pipeline = clipmb.CLIPPipeline.from_pretrained(model, backend=backend)
    passport_of(pipeline, normalized=True, long_text="truncate")  # which is kept, and no part of the jobs below
    uris = ["data:image/jpeg;base64," + base64.b64encode(content).decode() for content in files]
    fields = {
        "images": [{"input": uri, "modality": "image"} for uri in uris],
        "images, 8 at a time": [{"input": uris[i : i + 8], "modality": "image"} for i in range(0, len(uris), 8)],
        "texts": [{"input": text} for text in texts],
        "texts, 8 at a time": [{"input": texts[i : i + 8]} for i in range(0, len(texts), 8)],
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        server(model, "--deadline", "600", *(["--backend", backend] if backend else [])) as (process, port),
    ):
        paths = []
        for number, content in enumerate(files):
            paths.append(str(Path(folder, f"{number}.jpg")))
            Path(paths[-1]).write_bytes(content)

        def bulk(what: str) -> tuple[float, float]:
            """Seconds for each item, by the clock and of the processors."""
            begun, worked = time.perf_counter(), time.process_time()
            if what.startswith("images"):
                with tempfile.TemporaryDirectory() as out:
                    taken = clipmb.embed(paths, Path(out, "out"), model=pipeline)["seconds"]["total"]
            else:
                pipeline.encode_text(texts)
                taken = time.perf_counter() - begun
            count = len(paths if what.startswith("images") else texts)
            return taken / count, (time.process_time() - worked) / count

        def served(bodies: list[bytes], count: int, each: int) -> tuple[float, float]:
            """The same of the server."""
            worked = computed(process)
            taken = asyncio.run(drain(port, bodies, count))
            return taken / count / each, (computed(process) - worked) / count / each

        for what, asked in fields.items():
            bodies = [embedding_request(field) for field in asked]
            each = 8 if "8" in what else 1
            rounds = 2 if each > 1 else 4  # of all clients at least: fewer would end with steps that are not full
            count = max(rounds * CLIENTS, int(seconds / bulk(what)[0] / each))
            served(bodies, len(bodies), each)  # warms up
            pairs = [(*bulk(what), *served(bodies, count, each)) for _ in range(ROUNDS)]
            own, own_work, other, other_work = map(statistics.median, zip(*pairs, strict=True))
            row(
                f"{name}, {what}", "throughput", server=f"{1 / other:,.0f}/s", bulk=f"{1 / own:,.0f}/s",
                ratio=f"{own / other:.2f}", processors=f"{own_work / other_work:.2f}",
                goal=f"0.9 ({'met' if own / other >= 0.9 else 'not met'})",
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of mixed load")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run of the comparison with the bulk path")
    parser.add_argument("--backend", choices=clipmb.backends.installed())
    parser.add_argument("--folder", type=Path, default=Path("build/vit-b-32"))
    arguments = parser.parse_args()
    model = str(clipmb.small_model())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, picture in enumerate(clipmb.held_out_pictures()[0]):
            picture.save(folder / f"{number}.png")
        pipeline = clipmb.CLIPPipeline.from_pretrained(model, backend=arguments.backend)
        clipmb.embed(folder, folder / "out", model=pipeline)
        load = Load(pipeline, clipmb.Index.open(folder / "out", model=pipeline))
        with server(str(folder / "out"), "--max-bytes", str(2 << 20)) as (process, port):
            asyncio.run(soak(load, process, port, arguments.minutes))
    files = []
    for number, picture in enumerate(photos() * 32):
        buffer = io.BytesIO()
        picture.rotate(number).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    texts = [f"a photo of a thing that was turned by {number} degrees" for number in range(256)]
    throughput("small model", model, files, texts, arguments.backend, arguments.seconds)
    throughput(
        "ViT-B/32", str(vit_b_32(arguments.folder)), files[:32], texts[:96], arguments.backend, arguments.seconds
    )


if __name__ == "__main__":
    main()
