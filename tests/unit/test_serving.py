"""The server: right answers whoever else asks, one clear error for each wrong request, limits, and an orderly end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
import weakref

import httpx
import numpy as np
import pytest
from data_cases import jpeg
from embedding_cases import Engine, collection, pipeline
from processes import HANG, excerpt, invoke, start

import clipmb
from clipmb import CLIPPipeline, Index, application, embed, serve
from clipmb.embedding.passport import passport_digest, passport_of
from clipmb.serving.batching import Batcher
from clipmb.serving.metrics import Metrics

TEXTS = ["a cat", "a picture of a very small dog on a chair", "rocket", "b", "two words"]


def uri(content, kind="jpeg"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(number=0, size=(30, 22)):
    return uri(jpeg(number, size))


def pixels(number=0, size=(30, 22)):
    """What `CLIPPipeline.encode_image` takes for the same image."""
    return clipmb.common.image.pixels.read_image("it", jpeg(number, size))


def decoded(numbers):
    return [clipmb.common.image.resampling.as_image(pixels(number)) for number in numbers]


class Slow(Engine):
    """An engine that waits for leave before each step, and counts them."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()
        self.begun = threading.Event()

    def image_features(self, pixel_values):
        self.begun.set()
        assert self.go.wait(HANG)
        return super().image_features(pixel_values)

    def text_features(self, input_ids, attention_mask):
        self.begun.set()
        assert self.go.wait(HANG)
        return super().text_features(input_ids, attention_mask)


def with_engine(engine):
    return CLIPPipeline(engine, pipeline().processor)


def client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=HANG)


def ask(app, *requests):
    """Sends requests (method, path, options) at the same time; returns the responses."""

    async def run():
        async with client(app) as session:
            return await asyncio.gather(*(session.request(m, p, **options) for m, p, options in requests))

    return asyncio.run(run())


def post(app, path, body, **options):
    return ask(app, ("POST", path, {"content": json.dumps(body), **options}))[0]


def get(app, path, **options):
    return ask(app, ("GET", path, options))[0]


def vectors(response):
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]], np.float32)


def error(response, status, code, param=None):
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    assert found["type"] == kinds.get(status, "invalid_request_error")
    assert (found["code"], found["param"]) == (code, param), found
    return found["message"]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def app():
    return application(pipeline(), name="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("served")
    embed(collection(where / "pictures"), where / "out", model=pipeline(), workers=2)
    return where / "out"


@pytest.fixture(scope="module")
def searching(folder):
    return application(Index.open(folder, model=pipeline()))


def test_embeddings_of_texts(app):
    response = post(app, "/v1/embeddings", {"model": "tiny", "input": TEXTS})
    np.testing.assert_allclose(vectors(response), pipeline().encode_text(TEXTS), rtol=0, atol=1e-6)
    answer = response.json()
    rows, _ = pipeline().token_rows(TEXTS)
    tokens = sum(map(len, rows))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", i) for i in range(5)]
    one = vectors(post(app, "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "float", "user": "me"}))
    np.testing.assert_allclose(one, pipeline().encode_text(TEXTS[0]), rtol=0, atol=1e-6)


def test_embeddings_of_images(app):
    response = post(app, "/v1/embeddings", {"input": [picture(i) for i in range(3)], "modality": "image"})
    np.testing.assert_allclose(vectors(response), pipeline().encode_image(decoded(range(3))), rtol=0, atol=1e-6)
    assert response.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_base64_is_little_endian_float32(app):
    body = {"input": TEXTS[:2], "encoding_format": "base64"}
    answer = post(app, "/v1/embeddings", body).json()
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]]
    np.testing.assert_array_equal(rows, vectors(post(app, "/v1/embeddings", {"input": TEXTS[:2]})))


def test_messages_have_one_part(app):
    image = {"type": "image_url", "image_url": {"url": picture(4), "detail": "auto"}}
    for content, expected in (
        ([image], pipeline().encode_image(decoded([4]))),
        ([{"type": "text", "text": "a cat"}], pipeline().encode_text("a cat")),
        ("a cat", pipeline().encode_text("a cat")),
    ):
        body = {"messages": [{"role": "user", "content": content}]}
        np.testing.assert_allclose(vectors(post(app, "/v1/embeddings", body)), expected, rtol=0, atol=1e-6)
    both = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "a cat"}]}]}
    assert "must have one part" in error(post(app, "/v1/embeddings", both), 400, "invalid_value", "messages")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "either input or messages"),
        ({"input": "a", "messages": []}, "input", "either input or messages"),
        ({"input": []}, "input", "not empty"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": ["a", " "]}, "input[1]", "must not be empty"),
        ({"input": ["a", None]}, "input[1]", "must be a text"),
        ({"input": [1, 2]}, "input", "ids of tokens"),
        ({"input": [[1, 2]]}, "input", "ids of tokens"),
        ({"input": {"a": 1}}, "input", "a text or a list"),
        ({"input": "a", "dimensions": 3}, "dimensions", "have 6 numbers"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "modality": "audio"}, "modality", "'text' or 'image'"),
        ({"input": "a", "truncate": True}, "truncate", "no field 'truncate'"),
        ({"input": "no", "modality": "image"}, "input", "data URI"),
        ({"input": ["data:image/png;base64,????"], "modality": "image"}, "input[0]", "base64"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0]", "role 'user'"),
        ({"messages": "a"}, "messages[0]", "role 'user'"),
        ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages[0]", "role 'user'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", "A part"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]", "A part"),
        ({"messages": [], "modality": "text"}, "modality", "Leave modality out"),
        ({"input": None}, "input", "either input or messages. Received: neither"),
        ({"input": [["a"]]}, "input[0]", "must be a text"),
        ({"input": [1], "modality": "image"}, "input[0]", "must be the data URI of an image"),
        ({"input": ["a", "\ud800 b"]}, "input[1]", "without lone surrogates"),
        ({"input": "a", "\ud800": 1}, "\ud800", "There is no field '\\ud800'"),
        ({"input": "a", "encoding_format": ["float"]}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": True}, "dimensions", "have 6 numbers"),
        ({"input": "data:image/png,\ud800", "modality": "image"}, "input", "must be ASCII"),
        ({"input": "data:image/png;base64,\u00e9", "modality": "image"}, "input", "base64"),
        ({"input": "data:image/png;base64,-_==", "modality": "image"}, "input", "with + and /"),
        ({"input": "data:image/png;base64,abc", "modality": "image"}, "input", "the = at its end"),
        ({"input": "data:image/png;base64", "modality": "image"}, "input", "must be a data URI"),
        ({"input": ["a", " DATA:image/png;base64,AAAA"]}, "input[1]", "holds an image. Received: ' DATA:"),
        ({"input": picture(), "modality": "text"}, "input", "by modality"),
    ],
)  # fmt: skip
def test_what_a_request_may_not_say(app, body, param, message):
    code = "invalid_value"
    assert message in error(post(app, "/v1/embeddings", body), 400, code, param)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "a", "more": 1},
        {"type": "image_url", "image_url": {"url": picture()}, "more": 1},
        {"type": "image_url", "image_url": {"url": picture(), "more": 1}},
        {"type": "image_url", "image_url": {"url": picture(), "detail": "low"}},
        {"type": "image_url", "image_url": picture()},
    ],
)
def test_what_a_part_may_not_say(app, part):
    response = post(app, "/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]})
    assert "A part is a text or" in error(response, 400, "invalid_value", "messages[0].content[0]")


def test_the_dimension_may_be_said_and_the_model_may_not_be_another(app):
    assert vectors(post(app, "/v1/embeddings", {"input": "a", "dimensions": 6})).shape == (1, 6)
    wrong = post(app, "/v1/embeddings", {"input": "a", "model": "another"})
    assert "'tiny'" in error(wrong, 404, "model_not_found", "model")


@pytest.mark.parametrize("url", ["http://example.org/a.jpg", "HTTPS://example.org/a.jpg"])
def test_nothing_is_fetched(app, url):
    bodies = [
        ({"input": [url], "modality": "image"}, "input[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
            "messages[0].content[0].image_url.url",
        ),
    ]
    for body, param in bodies:
        assert "Nothing is fetched" in error(post(app, "/v1/embeddings", body), 400, "url_not_fetched", param)


def test_a_path_is_not_read(app, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    for text in (str(tmp_path / "secret.jpg"), f"file://{tmp_path}/secret.jpg"):
        error(post(app, "/v1/embeddings", {"input": text, "modality": "image"}), 400, "invalid_value", "input")


def test_null_is_as_left_out(app):
    body = {
        "input": "a",
        "messages": None,
        "model": None,
        "encoding_format": None,
        "modality": None,
        "dimensions": None,
    }
    expected = pipeline().encode_text("a")
    np.testing.assert_allclose(vectors(post(app, "/v1/embeddings", body)), expected, rtol=0, atol=1e-6)
    image = {"type": "image_url", "image_url": {"url": picture(4), "detail": None}}
    body = {"messages": [{"role": "user", "content": [image]}], "modality": None}
    assert vectors(post(app, "/v1/embeddings", body)).shape == (1, 6)
    assert post(app, "/classify", {"images": picture(), "labels": ["a", "b"], "templates": None}).status_code == 200


def test_forms_of_data_uris(app):
    head, _, content = picture(3).partition(",")
    expected = pipeline().encode_image(decoded([3]))
    lines = "\r\n".join(content[at : at + 76] for at in range(0, len(content), 76))
    escaped = content.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    for form in (
        f" {head},{content}\n", f"DATA:image/jpeg;BASE64,{content}", f"data:;base64,{content}", f"{head},{lines}",
        f"data:image/jpeg;name=a;charset=utf-8; base64 , {content}", f"{head},{escaped}",
        f"{head},{escaped[:30]}%0D%0A {escaped[30:]}",
    ):  # fmt: skip
        found = vectors(post(app, "/v1/embeddings", {"input": form, "modality": "image"}))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    named = f"data:image/jpeg;base64=no,{content}"
    error(post(app, "/v1/embeddings", {"input": named, "modality": "image"}), 400, "image_unreadable", "input")


def test_a_data_uri_may_be_percent_encoded_and_a_bomb_is_refused(app, monkeypatch):
    from urllib.parse import quote_from_bytes

    content = f"data:image/jpeg,{quote_from_bytes(jpeg(2, (30, 22)))}"
    found = vectors(post(app, "/v1/embeddings", {"input": content, "modality": "image"}))
    np.testing.assert_allclose(found, pipeline().encode_image(decoded([2])), rtol=0, atol=1e-6)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    response = post(app, "/v1/embeddings", {"input": picture(), "modality": "image"})
    assert "reasonable size" in error(response, 400, "image_unreadable", "input")


def test_long_texts(app):
    long = "very " * 40 + "long"
    for option in ("truncate", "mean"):
        found = post(application(pipeline(), long_text=option), "/v1/embeddings", {"input": ["a", long, "b"]})
        expected = pipeline().encode_text(["a", long, "b"], long_text=option)
        np.testing.assert_allclose(vectors(found), expected, rtol=0, atol=1e-6)
    assert "at most 14 tokens" in error(
        post(application(pipeline(), long_text="error"), "/v1/embeddings", {"input": ["a", long]}),
        400, "text_too_long", "input[1]",
    )  # fmt: skip


def test_many_clients_share_steps_and_get_their_own_results():
    engine = Slow()
    engine.few_shapes = True
    app = application(with_engine(engine), batch_size=8, max_wait=50)
    bodies = [{"input": picture(i), "modality": "image"} for i in range(20)]
    bodies[5]["input"] = uri(jpeg(5)[:300])
    bodies += [{"input": [f"text {i}", f"another text of a client {i}"]} for i in range(10)]

    async def run():
        async with client(app) as session:
            asked = [asyncio.ensure_future(session.post("/v1/embeddings", json=body)) for body in bodies]
            await until(engine.begun.is_set)
            await until(asked[5].done)  # the broken image is answered while the model is busy
            assert not any(one.done() for one in asked[:5])
            engine.go.set()
            return await asyncio.gather(*asked)

    found = asyncio.run(run())
    assert "readable image" in error(found[5], 400, "image_unreadable", "input")
    good = [i for i in range(20) if i != 5]
    images = pipeline().encode_image(decoded(good))
    np.testing.assert_allclose(np.concatenate([vectors(found[i]) for i in good]), images, rtol=0, atol=1e-6)
    texts = pipeline().encode_text([text for body in bodies[20:] for text in body["input"]])
    np.testing.assert_allclose(np.concatenate(list(map(vectors, found[20:]))), texts, rtol=0, atol=1e-6)
    assert engine.calls < 15  # for 39 items
    assert {shape[0] for shape in engine.shapes} <= {1, 2, 4, 8}
    assert max(shape[0] for shape in engine.shapes if len(shape) == 4) == 8


@pytest.mark.parametrize("few_shapes", [None, True])
def test_only_for_compilers_shapes_are_few(few_shapes):
    engine = Slow()
    if few_shapes is not None:
        engine.few_shapes = few_shapes
    app = application(with_engine(engine), batch_size=8, max_wait=0)

    async def run():
        async with client(app) as session:
            first = asyncio.ensure_future(
                session.post("/v1/embeddings", json={"input": picture(), "modality": "image"})
            )
            await until(engine.begun.is_set)
            body = {"input": ["a", "a b", "a b c", "a b c d", "a b", "a b"]}  # 3 to 6 tokens
            then = asyncio.ensure_future(session.post("/v1/embeddings", json=body))
            while "queue_items 7" not in (await session.get("/metrics")).text:
                await asyncio.sleep(0.01)
            engine.go.set()
            return await first, body, await then

    _, body, found = asyncio.run(run())
    np.testing.assert_allclose(vectors(found), pipeline().encode_text(body["input"]), rtol=0, atol=1e-6)
    texts = {shape for shape in engine.shapes if len(shape) == 2}
    assert texts == ({(4, 6), (2, 4)} if few_shapes else {(6, 6)})


def test_only_the_request_of_the_item_at_fault_fails():
    calls = []

    def compute(values):
        calls.append(len(values))
        if 3 in values:
            raise RuntimeError("three")
        return np.array(values)[:, None] * 2

    batcher = Batcher({"a": compute}, {"a": 4}, 10)
    first, second = batcher.submit("a", [1, 2], [1, 1]), batcher.submit("a", [3, 4], [1, 1])
    assert first.result(HANG).tolist() == [[2], [4]]
    with pytest.raises(RuntimeError, match="three"):
        second.result(HANG)
    assert calls == [4, 1, 1, 1, 1]
    batcher.close()
    assert not batcher.alive
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", [1], [1])


def stepped(lengths, size, **options):
    """The steps that a batcher makes of items of these lengths that wait together, as lengths."""
    steps, go = [], threading.Event()

    def compute(values):
        assert go.wait(HANG)
        steps.append(values)
        return np.array(values)[:, None]

    batcher = Batcher({"a": compute, "b": compute}, {"a": size, "b": 1}, 1000, **options)
    first = batcher.submit("b", [0], [1])  # keeps the thread busy
    work = batcher.submit("a", lengths, lengths)
    threading.Thread(target=lambda: (first.result(HANG), batcher.close())).start()
    go.set()
    assert work.result(HANG).ravel().tolist() == lengths  # each its own row
    assert steps.pop(0) == [0]
    return steps


def test_a_step_takes_the_oldest_and_those_of_like_length():
    assert stepped([1] * 9, 4) == [[1] * 4, [1] * 4, [1]]
    assert stepped([1] * 9, 16) == [[1] * 9]
    assert stepped([1] * 9, 16, few_sizes=True) == [[1] * 8, [1]]
    assert stepped([1] * 19, 16, few_sizes=True) == [[1] * 16, [1] * 2, [1]]
    assert stepped([30, 77, 28, 76, 29, 30], 8) == [[30, 30, 29, 28], [77, 76]]  # no step more is padding
    assert stepped([28, 77, 30, 76, 29, 30], 8) == [[28, 29, 30, 30], [77, 76]]
    assert stepped([10, 26], 8) == [[10, 26]]  # a step of its own would cost as much
    assert stepped([10, 27], 8) == [[10], [27]]
    assert stepped([50] * 4 + [56], 8) == [[50] * 4 + [56]]  # 4 * 6 is less than an eighth of 4 * 50
    assert stepped([50] * 4 + [57], 8) == [[50] * 4, [57]]
    assert stepped([56] * 4 + [50] * 4, 8) == [[56] * 4 + [50] * 4]
    assert stepped([56] * 4 + [50] * 4, 5) == [[56] * 4 + [50], [50] * 3]


def test_cancelled_items_are_not_computed_and_not_kept():
    go, begun, steps = threading.Event(), threading.Event(), []

    def compute(values):
        begun.set()
        assert go.wait(HANG)
        steps.append([int(value.sum()) for value in values])
        return np.array(values)

    batcher = Batcher({"a": compute}, {"a": 8}, 0)
    first = batcher.submit("a", [np.array([1])], [1])
    assert begun.wait(HANG)
    values = [np.array([2]), np.array([3])]
    kept = [weakref.ref(value) for value in values]
    cancelled = batcher.submit("a", values, [1, 1])
    last = batcher.submit("a", [np.array([4])], [1])
    between = batcher.submit("a", [np.array([5])], [1])
    after = batcher.submit("a", [np.array([6])], [1])
    assert cancelled.cancel()
    batcher.withdraw()
    del values
    assert [reference() for reference in kept] == [None, None]
    assert between.cancel()  # and is not withdrawn
    assert batcher.submit("a", [np.array([7])], [1]).cancel()
    go.set()
    assert [int(work.result(HANG)[0, 0]) for work in (first, last, after)] == [1, 4, 6]
    batcher.close()
    assert sorted(one for step in steps for one in step) == [1, 4, 6]


def test_the_first_broken_item_answers_at_once_and_takes_the_rest_of_its_request_along(folder):
    engine = Slow()
    asked = []
    computed = engine.text_features
    engine.text_features = lambda ids, mask: (asked.append(len(ids)), computed(ids, mask))[1]
    app = application(Index.open(folder, model=with_engine(engine)), max_wait=0)

    async def run():
        async with client(app) as session:
            first = asyncio.ensure_future(session.post("/v1/embeddings", json={"input": "a"}))
            await until(engine.begun.is_set)
            body = {"text": ["b", "c"], "image": [picture(1), uri(b"no image")]}
            broken = await session.post("/search", json=body)  # while the engine is busy
            metrics = (await session.get("/metrics")).text
            engine.go.set()
            return await first, broken, metrics

    first, broken, metrics = asyncio.run(run())
    error(broken, 400, "image_unreadable", "image[1]")
    assert "\nclipmb_queue_items 1\n" in metrics
    assert first.status_code == 200
    assert asked == [1]


def test_a_full_queue_is_429_and_nothing_of_it_is_lost():
    engine = Slow()
    app = application(with_engine(engine), queue=4, max_wait=0)

    async def run():
        async with client(app) as session:
            body = {"input": ["a", "b", "c"]}
            asked = asyncio.ensure_future(session.post("/v1/embeddings", json=body))
            await until(engine.begun.is_set)
            refused = await session.post("/v1/embeddings", json={"input": ["d", "e"]})
            taken = asyncio.ensure_future(session.post("/v1/embeddings", json={"input": "d"}))
            await asyncio.sleep(0.05)
            metrics = (await session.get("/metrics")).text
            engine.go.set()
            later = [await asked, await taken, await session.post("/v1/embeddings", json={"input": ["d", "e"]})]
            return refused, metrics, later

    refused, metrics, later = asyncio.run(run())
    assert "queue is full" in error(refused, 429, "queue_full")
    assert refused.headers["retry-after"] == "1"
    assert "\nclipmb_queue_items 4\n" in metrics
    assert [len(vectors(response)) for response in later] == [3, 1, 2]
    too_many = post(app, "/v1/embeddings", {"input": list("abcde")})
    assert "at most 4" in error(too_many, 400, "too_many_inputs")


def test_a_deadline_is_503_and_takes_the_work_away(monkeypatch):
    engine, left, withdraw = Slow(), [], Batcher.withdraw

    def withdrawn(batcher):
        withdraw(batcher)
        left.append(sum(map(len, batcher._queues.values())))

    monkeypatch.setattr(Batcher, "withdraw", withdrawn)
    app = application(with_engine(engine), deadline=0.2, max_wait=0, queue=3)

    async def run():
        async with client(app) as session:
            late = [session.post("/v1/embeddings", json={"input": text}) for text in ("a", "b", "c")]
            late = await asyncio.gather(*late)
            engine.go.set()
            return late, await session.post("/v1/embeddings", json={"input": ["d", "e", "f"]})

    late, later = asyncio.run(run())
    for response in late:
        assert "0.2 seconds" in error(response, 503, "deadline_exceeded")
        assert response.headers["retry-after"] == "1"
    assert len(vectors(later)) == 3
    assert left[-1] == 0  # at once, and not when their turn comes
    assert sum(shape[0] for shape in engine.shapes) <= 4  # b and c were not computed


def test_a_client_that_goes_away_takes_its_work_along():
    engine = Slow()
    app = application(with_engine(engine), max_wait=0)
    gone = asyncio.Event

    async def run():
        left = gone()

        async def receive(parts=[{"type": "http.request", "body": b'{"input": "never computed"}'}]):  # noqa: B006
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        sent = []
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b""}
        async with client(app) as session:
            busy = asyncio.ensure_future(session.post("/v1/embeddings", json={"input": "a"}))
            await until(engine.begun.is_set)
            call = asyncio.ensure_future(app({**scope, "app": None}, receive, send))
            await asyncio.sleep(0.05)
            assert "\nclipmb_queue_items 2\n" in (await session.get("/metrics")).text
            left.set()
            await call
            metrics = (await session.get("/metrics")).text
            engine.go.set()
            await busy
            return metrics

    metrics = asyncio.run(run())
    assert "\nclipmb_queue_items 1\n" in metrics
    assert 'clipmb_requests_total{route="/v1/embeddings",status="499"} 1\n' in metrics
    assert engine.calls == 1


def test_bodies(app):
    small = application(pipeline(), max_bytes=200)
    assert post(small, "/v1/embeddings", {"input": "a"}).status_code == 200
    large = json.dumps({"input": "a" * 250}).encode()
    assert "at most 200 bytes" in error(post(small, "/v1/embeddings", {"input": "a" * 250}), 413, "too_large")

    async def pieces():
        for at in range(0, len(large), 10):
            yield large[at : at + 10]

    error(ask(small, ("POST", "/v1/embeddings", {"content": pieces()}))[0], 413, "too_large")
    sent = []

    async def without_end():
        while True:
            sent.append(b"a" * 100)
            yield sent[-1]

    error(ask(small, ("POST", "/v1/embeddings", {"content": without_end()}))[0], 413, "too_large")
    assert 0 < len(sent) < 10
    sent.clear()
    headers = {"expect": "100-continue", "content-length": "1000"}
    error(ask(small, ("POST", "/v1/embeddings", {"content": without_end(), "headers": headers}))[0], 413, "too_large")
    assert not sent  # and the client has not begun
    for content in (b"", b"{", b"\xff", b"[" * 10**5, b'{"input": NaN'):
        error(ask(app, ("POST", "/v1/embeddings", {"content": content}))[0], 400, "invalid_json")
    error(ask(app, ("POST", "/v1/embeddings", {"content": b"[1]"}))[0], 400, "invalid_json")
    for content, message in (
        (b'{"input": "a", "user": NaN}', "NaN, which JSON does not have"),
        (b'{"input": "a", "user": -Infinity}', "-Infinity, which"),
        (b'{"input": "a", "input": "b"}', "'input' twice"),
        (b'{"messages": [{"role": "user", "content": "a", "role": "user"}]}', "'role' twice"),
    ):
        assert message in error(ask(app, ("POST", "/v1/embeddings", {"content": content}))[0], 400, "invalid_json")


@pytest.mark.parametrize("coding", ["gzip", "br, gzip", "GZIP", ""])
def test_compressed_bodies_are_refused(app, coding):
    response = post(app, "/v1/embeddings", {"input": "a"}, headers={"content-encoding": coding})
    assert "must not be compressed" in error(response, 415, "content_encoding")
    assert response.headers["accept-encoding"] == "identity"
    assert post(app, "/v1/embeddings", {"input": "a"}, headers={"content-encoding": "Identity"}).status_code == 200


def test_a_body_that_does_not_arrive_is_an_error_of_the_client():
    app = application(pipeline(), deadline=0.1)

    async def pieces():
        yield b'{"input": '
        await asyncio.sleep(HANG)

    response = ask(app, ("POST", "/v1/embeddings", {"content": pieces()}))[0]
    assert "within 0.1 seconds" in error(response, 408, "body_late")
    assert response.headers["connection"] == "close"


def test_large_bodies_are_held_within_a_limit():
    engine = Slow()
    app = application(with_engine(engine), max_bytes=100, max_wait=0)

    async def run():
        async with client(app) as session:
            body = {"input": "a" * 70}
            asked = [asyncio.ensure_future(session.post("/v1/embeddings", json=body)) for _ in range(12)]
            await until(lambda: sum(one.done() for one in asked))
            engine.go.set()
            return await asyncio.gather(*asked)

    statuses = [response.status_code for response in asyncio.run(run())]
    assert sorted(statuses) == [200] * 9 + [429] * 3  # 82 bytes each, at most 800
    assert [post(app, "/v1/embeddings", {"input": "a" * 70}).status_code for _ in range(12)] == [200] * 12


def test_routes_and_methods(app):
    assert "no GET /nothing" in error(get(app, "/nothing"), 404, "not_found")
    assert "does not take GET" in error(get(app, "/v1/embeddings"), 405, "method_not_allowed")
    assert get(app, "/v1/embeddings").headers["allow"] == "POST"
    assert set(ask(app, ("PUT", "/search", {}))[0].headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    listed = get(app, "/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"] == [get(app, "/v1/models/tiny").json()]
    assert listed["data"][0]["id"] == "tiny"
    error(get(app, "/v1/models/other"), 404, "model_not_found", "model")
    error(post(app, "/v1/embeddings/", {"input": "a"}), 404, "not_found")  # and no redirection
    assert ask(app, ("HEAD", "/health", {}))[0].status_code == 200
    assert get(app, "/health").json() == {"status": "ok"}
    for path in ("/health", "/nothing"):
        headers = get(app, path).headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_the_page_needs_nothing_from_elsewhere(app):
    response = get(app, "/")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert not re.search(r"https?:|unsafe|\*", policy)
    page = response.text
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bon\w+=|style=", page)
    for tag, content in re.findall(r"<(script|style)>(.*?)</", page, re.S):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert page.count("<script") == page.count("<style") == 1


def test_token():
    app = application(pipeline(), token="a-secret")
    paths = ["/v1/models", "/metrics", "/search?q=a", "/thumbnail/images/0"]
    for given in (None, "Bearer wrong", "a-secret", "Basic a-secret", "Bearer a-secret-", "Bearer"):
        headers = {} if given is None else {"authorization": given}
        for path in paths:
            response = get(app, path, headers=headers)
            assert "bearer token" in error(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            assert "a-secret" not in response.text
        error(post(app, "/v1/embeddings", {"input": "a"}, headers=headers), 401, "invalid_api_key")
    right = {"authorization": "bearer a-secret"}
    assert get(app, "/v1/models", headers=right).status_code == 200
    assert vectors(post(app, "/v1/embeddings", {"input": "a"}, headers=right)).shape == (1, 6)
    assert get(app, "/health").status_code == 200
    assert get(app, "/").status_code == 200  # it asks for the token


def test_hosts():
    app = application(pipeline(), hosts={"localhost", "127.0.0.1", "::1"})
    assert get(app, "/health", headers={"host": "LOCALHOST:8000"}).status_code == 200
    assert get(app, "/health", headers={"host": "127.0.0.1"}).status_code == 200
    assert get(app, "/health", headers={"host": "[::1]:8000"}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "[", "localhost:a", "[::2]:80"):
        assert "127.0.0.1 or ::1 or localhost" in error(get(app, "/health", headers={"host": host}), 421, "wrong_host")


def test_passport(app, searching, folder):
    passport = passport_of(pipeline(), normalized=True, long_text="truncate")
    digest = passport_digest(passport)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    for one in (app, searching):
        assert get(one, "/health").headers["x-clipmb-passport"] == digest
        assert get(one, "/nothing").headers["x-clipmb-passport"] == digest
    assert passport_digest({**passport, "backend": "other", "dtype": "float64"}) == digest
    assert passport_digest({**passport, "dtype": "bfloat16"}) != digest
    assert get(app, "/v1/models").json()["data"][0]["passport"] == passport


def test_classify(app):
    labels, numbers = ["cat", "small dog", "rocket"], range(4)
    expected = pipeline().classify(decoded(numbers), labels, ["a {}.", "the {}"])
    body = {"images": [picture(i) for i in numbers], "labels": labels, "templates": ["a {}.", "the {}"]}
    for _ in range(2):  # the second time with kept embeddings of the classes
        answer = post(app, "/classify", body).json()
        found = [row["probabilities"] for row in answer["results"]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert [row["label"] for row in answer["results"]] == [labels[i] for i in expected.argmax(1)]
        assert [row["index"] for row in answer["results"]] == list(numbers)
    one = post(app, "/classify", {"images": picture(1), "labels": labels, "templates": "seven", "model": "tiny"})
    expected = pipeline().classify(decoded([1]), labels, "seven")
    np.testing.assert_allclose(one.json()["results"][0]["probabilities"], expected[0], rtol=1e-5)
    error(
        post(app, "/classify", {"images": picture(), "labels": labels, "model": "a"}), 404, "model_not_found", "model"
    )


def test_embeddings_of_classes_are_kept(monkeypatch):
    monkeypatch.setattr("clipmb.serving.service._CLASSES", 2)
    model = pipeline()
    app = application(model)

    def steps(labels, templates="{}"):
        before = model.engine.calls
        found = post(app, "/classify", {"images": picture(1), "labels": labels, "templates": templates}).json()
        expected = pipeline().classify(decoded([1]), labels, templates)
        np.testing.assert_allclose(found["results"][0]["probabilities"], expected[0], rtol=1e-5)
        return model.engine.calls - before

    assert steps(["cat", "bat"]) == 2
    assert steps(["a"], ["c{}t", "b{}t"]) == 2  # the same prompts
    assert steps(["cat", "bat"]) == 1
    assert steps(["cat", "rat"]) == 2
    assert steps(["cat", "bat"]) == 1  # used last before, so that the other was dropped
    assert steps(["a"], ["c{}t", "b{}t"]) == 2


def test_classes_that_are_dropped_while_their_images_are_computed(monkeypatch):
    monkeypatch.setattr("clipmb.serving.service._CLASSES", 1)
    engine = Slow()
    app = application(with_engine(engine), batch_size=1, max_wait=0)
    first, other = ({"images": picture(1), "labels": ["cat", name]} for name in ("dog", "bat"))

    async def run():
        async with client(app) as session:
            engine.go.set()
            await session.post("/classify", json=first)
            engine.go.clear()
            both = [asyncio.ensure_future(session.post("/classify", json=body)) for body in (other, first)]
            while "queue_items 4" not in (await session.get("/metrics")).text:
                await asyncio.sleep(0.01)
            engine.go.set()
            return [(await one).status_code for one in both]

    assert asyncio.run(run()) == [200, 200]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"labels": []}, "labels"), ({"labels": ["a", "a"]}, "labels"), ({"labels": "a"}, "labels"),
        ({"labels": None}, "labels"), ({"images": []}, "images"), ({"images": "http://a/b"}, "images"),
        ({"templates": "no place"}, "templates"), ({"templates": [1]}, "templates"), ({"more": 1}, "more"),
    ],
)  # fmt: skip
def test_what_a_classification_may_not_say(app, change, param):
    response = post(app, "/classify", {"images": picture(), "labels": ["a", "b"], **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_search(searching, folder):
    index = Index.open(folder, model=pipeline())
    for kind in ("images", "texts"):
        found = get(searching, f"/search?q=a%20cat&q=a+dog&minus=b&k=4&kind={kind}&where=width%3E%3D22").json()
        assert found["kind"] == kind
        expected = index.search(["a cat", "a dog"], k=4, kind=kind, where="width>=22", minus_text="b")
        assert [hit["row"] for hit in found["results"]] == [hit["row"] for hit in expected]
        assert [hit["id"] for hit in found["results"]] == [hit["id"] for hit in expected]
        np.testing.assert_allclose(
            [hit["score"] for hit in found["results"]], [hit["score"] for hit in expected], atol=1e-6
        )
        assert all("path" not in hit and "width" in hit for hit in found["results"])
    body = {"image": [picture(3)], "text": "a cat", "minus_image": picture(1), "k": 3}
    expected = index.search("a cat", decoded([3]), k=3, minus_image=decoded([1]))
    found = post(searching, "/search", body).json()["results"]
    assert [hit["row"] for hit in found] == [hit["row"] for hit in expected]
    body = {"image": picture(3), "text": [], "minus_text": [], "where": "width=2"}
    expected = index.search(image=decoded([3]), where="width=2")
    assert [hit["row"] for hit in post(searching, "/search", body).json()["results"]] == [
        hit["row"] for hit in expected
    ]
    assert len(get(searching, "/search?q=a").json()["results"]) == 10 < index.count("images")
    assert len(get(searching, "/search?q=a&k=1000").json()["results"]) == index.count("images")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "text"), ("q=", "text[0]"), ("q=a&k=0", "k"), ("q=a&k=x", "k"), ("q=a&k=1001", "k"), ("q=a&k=1&k=2", "k"),
        ("q=a&k=-1", "k"), ("q=a&k=1e2", "k"), ("q=a&k=%D9%A3", "k"), ("q=a&k=" + "9" * 5000, "k"),
        ("q=a&kind=sounds", "kind"), ("q=a&where=", "where"), ("q=a&where=nothing", "where"),
        ("q=a&where=nowhere%3D1", "where"),
        ("q=%FF", None), ("q=a%ED%A0%80", None), ("q=data:image/png;base64,AAAA", "text[0]"),
        ("q=a&more=1", "more"), ("q=a&minus=a", "minus_text"),
    ],
)  # fmt: skip
def test_what_a_search_may_not_say(searching, query, param):
    response = get(searching, f"/search?{query}")
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"k": True}, "k"), ({"k": 1.0}, "k"), ({"k": "3"}, "k"), ({"k": 10**9}, "k"), ({"kind": ["images"]}, "kind"),
        ({"where": 0}, "where"), ({"where": {}}, "where"), ({"where": [" "]}, "where"), ({"text": 0}, "text"),
        ({"text": None}, "text"), ({"minus_image": "a"}, "minus_image"), ({"more": None}, "more"),
    ],
)  # fmt: skip
def test_what_the_body_of_a_search_may_not_say(searching, change, param):
    response = post(searching, "/search", {"text": "a", "k": 1, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_model_alone_cannot_be_searched(app):
    error(get(app, "/search?q=a"), 404, "no_index")
    error(get(app, "/thumbnail/images/0"), 404, "no_index")


def test_a_folder_that_is_appended_to_embedded_anew_and_removed(tmp_path, caplog):
    pictures = collection(tmp_path / "pictures")
    embed(pictures, tmp_path / "out", model=pipeline(), workers=2)
    app = application(Index.open(tmp_path / "out", model=pipeline()))
    first = get(app, "/search?q=a").json()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "1.jpg").write_bytes(jpeg(50))
    embed(tmp_path / "more", tmp_path / "out", model=pipeline(), workers=1, append=True)
    assert get(app, "/search?q=a").json() == first
    for model in (pipeline(2.0), None):
        shutil.rmtree(tmp_path / "out")
        if model:
            embed(pictures, tmp_path / "out", model=model, workers=2)
        for query in ("q=a", "q=a&where=width>=0", "q=a&k=1&kind=texts"):
            message = error(get(app, f"/search?{query}"), 503, "index_changed")
            assert "started again" in message
            assert str(tmp_path) not in message
        assert str(tmp_path) in caplog.text


def test_thumbnails_are_of_rows_only(searching, folder):
    hit = get(searching, "/search?q=a&k=1").json()["results"][0]
    response = get(searching, "/" + hit["thumbnail"])
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/jpeg"
    assert response.content.startswith(b"\xff\xd8")
    assert "thumbnail" not in get(searching, "/search?q=alone&kind=texts&k=1&where=width%3D2").json()["results"][0]
    for path in ("images/11", "images/-1", "sounds/0", "images/..%2F..%2Fetc%2Fpasswd", f"texts/{10**30}", "texts/11",
                 "texts/" + "9" * 5000, "images/%D9%A3", "images/1.0"):  # fmt: skip
        error(get(searching, f"/thumbnail/{path}"), 404, "not_found")


def test_metrics(app):
    fresh = application(pipeline(), name="tiny", batch_size=4)
    post(fresh, "/v1/embeddings", {"input": ["a", "b", "c"]})
    post(fresh, "/v1/embeddings", {"input": ""})
    get(fresh, "/nothing")
    text = get(fresh, "/metrics").text
    for line in (
        'clipmb_requests_total{route="/v1/embeddings",status="200"} 1',
        'clipmb_requests_total{route="/v1/embeddings",status="400"} 1',
        'clipmb_requests_total{route="other",status="404"} 1',
        'clipmb_request_seconds_count{route="/v1/embeddings"} 2',
        'clipmb_request_seconds_bucket{route="/v1/embeddings",le="+Inf"} 2',
        'clipmb_items_total{kind="text"} 3',
        'clipmb_batch_size_bucket{kind="text",le="2"} 0',
        'clipmb_batch_size_bucket{kind="text",le="4"} 1',
        'clipmb_batch_size_sum{kind="text"} 3',
        "clipmb_queue_items 0",
        "# TYPE clipmb_batch_size histogram",
    ):
        assert f"\n{line}\n" in f"\n{text}", line
    assert get(app, "/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_labels_are_escaped():
    metrics = Metrics()
    add = metrics.counter("a_total", "About.", ("name",))
    add('quote " slash \\ line \n', by=2.5)
    assert (
        metrics.text()
        == '# HELP a_total About.\n# TYPE a_total counter\na_total{name="quote \\" slash \\\\ line \\n"} 2.5\n'
    )


def test_embeddings_are_of_the_length_of_those_of_the_folder(tmp_path):
    embed(collection(tmp_path / "pictures"), tmp_path / "out", model=pipeline(), workers=2, normalize=False)
    response = post(application(Index.open(tmp_path / "out", model=pipeline())), "/v1/embeddings", {"input": TEXTS})
    np.testing.assert_allclose(vectors(response), pipeline().encode_text(TEXTS, normalize=False), rtol=1e-6)


@pytest.mark.parametrize("factor", [float("inf"), 0.0])
def test_embeddings_that_cannot_be_used_are_an_error_of_the_server(factor):
    app = application(pipeline(factor))
    assert "must be finite" in error(post(app, "/v1/embeddings", {"input": "a"}), 500, "not_finite")


def test_an_error_of_the_server_says_nothing_of_its_inside(app, monkeypatch, caplog):
    monkeypatch.setattr("clipmb.serving.app._embeddings", lambda *_: 1 / 0)
    message = error(post(app, "/v1/embeddings", {"input": "a"}), 500, "internal_error")
    assert "division" not in message
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must be"), ({"name": 3}, "name must be"),
        ({"token": ""}, "token must be"), ({"token": "a b"}, "token must be"), ({"token": "ä"}, "token must be"),
        ({"batch_size": 0}, "batch_size"), ({"queue": 0}, "queue"), ({"deadline": 0}, "deadline"),
        ({"max_wait": -1}, "max_wait"), ({"max_bytes": 0}, "max_bytes"), ({"workers": 0}, "workers"),
        ({"long_text": "cut"}, "long_text"), ({"model": "another"}, "folder of embeddings"),
        ({"dtype": "float16"}, "fixed when the pipeline is created"),
    ],
)  # fmt: skip
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        application(pipeline(), **options)


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"long_text": "mean"}])
def test_what_a_folder_decides_cannot_be_chosen(folder, options):
    with pytest.raises(ValueError, match=f"decides how queries are embedded. Received: {next(iter(options))}"):
        application(folder, model=pipeline(), **options)


def test_a_folder_needs_the_model_that_made_it(folder):
    with pytest.raises(ValueError, match="one model made them"):
        application(folder, model=pipeline(2.0))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.example"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ValueError, match="needs a token"):
        serve(pipeline(), host=host, port=0)
    done = invoke("serve", "nothing", "--host", host)
    assert done.exit_code == 1
    assert "--no-token" in done.stderr


def test_a_token_and_none_exclude_each_other():
    with pytest.raises(ValueError, match="a token or is open"):
        serve(pipeline(), token="a", open_to_all=True)


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1 port {port} cannot be had"):
            serve("no such model", port=port)


@pytest.mark.parametrize(
    ("options", "hosts"),
    [({}, {"localhost", "127.0.0.1", "::1"}), ({"host": "[::1]"}, {"localhost", "127.0.0.1", "::1"}),
     ({"host": "127.0.0.2"}, {"localhost", "127.0.0.1", "::1", "127.0.0.2"}), ({"hosts": {"clip"}}, {"clip"}),
     ({"open_to_all": True}, None), ({"token": "a"}, None)],
)  # fmt: skip
def test_the_names_that_a_server_answers_to(monkeypatch, options, hosts):
    def made(*_, **given):
        raise StopIteration(given.get("hosts"))

    monkeypatch.setattr("clipmb.serving.server.application", made)
    with pytest.raises(StopIteration) as stopped:
        serve(pipeline(), port=0, **options)
    assert stopped.value.value == hosts


SERVER = """
import sys, time
from embedding_cases import Engine, pipeline
import clipmb
wait = Engine.text_features
Engine.text_features = lambda *given: (print("begun", flush=True), time.sleep(0.5), wait(*given))[2]
clipmb.serve(pipeline(), port=0, started=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_what_was_accepted(number):
    process = start("-c", SERVER, PYTHONPATH=":".join(__import__("sys").path))
    url = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127.0.0.1:\d+", url), excerpt(process.stderr.read())
    answers = []

    def asks():
        request = urllib.request.Request(f"{url}/v1/embeddings", b'{"input": "a"}')
        with urllib.request.urlopen(request, timeout=HANG) as response:
            answers.append(json.load(response))

    asking = threading.Thread(target=asks)
    asking.start()
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    asking.join()
    out, errors = process.communicate(timeout=HANG)
    assert len(answers[0]["data"][0]["embedding"]) == 6
    assert (process.returncode, out) == (0, "ended\n"), excerpt(errors)
    assert errors == ""


PATIENCE = """
import sys
from embedding_cases import pipeline
import clipmb
clipmb.serve(pipeline(), port=0, deadline=0.5, started=lambda url: print(url, flush=True))
"""


def test_a_second_sigint_ends_the_server_at_once():
    process = start(
        "-c", SERVER.replace("time.sleep(0.5)", "time.sleep(3)"), PYTHONPATH=":".join(__import__("sys").path)
    )
    url = process.stdout.readline().strip()
    assert url, excerpt(process.stderr.read())
    request = urllib.request.Request(f"{url}/v1/embeddings", b'{"input": "a"}')
    found = []

    def asks():
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=HANG)
        found.append((refused.value.code, json.load(refused.value)["error"]["code"]))

    asking = threading.Thread(target=asks)
    asking.start()
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    asking.join()
    out, errors = process.communicate(timeout=HANG)
    assert found == [(503, "shutting_down")]
    assert (process.returncode, out, errors) == (0, "ended\n", "")


def test_headers_that_do_not_end_close_the_connection():
    process = start("-c", PATIENCE, PYTHONPATH=":".join(__import__("sys").path))
    url = process.stdout.readline().strip()
    assert url, excerpt(process.stderr.read())
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    try:
        for first in (b"", whole[:-2], whole + whole[:-2]):
            with socket.create_connection(address, timeout=HANG) as connection:
                connection.sendall(first)
                received = b""
                while part := connection.recv(1 << 16):  # ends when the server closes
                    received += part
                assert received.count(b"200 OK") == first.count(whole)
        for first in (whole[:-2], whole + whole[:-2]):  # and then drop by drop
            with socket.create_connection(address, timeout=HANG) as connection:
                connection.sendall(first)
                with pytest.raises(OSError):  # noqa: PT012
                    for _ in range(HANG * 10):
                        connection.sendall(b"X: a\r\n")
                        threading.Event().wait(0.1)
        with socket.create_connection(address, timeout=HANG) as connection:  # in time
            for at in range(0, len(whole), 10):
                connection.sendall(whole[at : at + 10])
            assert b"200 OK" in connection.recv(1 << 16)
    finally:
        process.terminate()
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, ""), excerpt(errors)


def test_the_command_serves_the_small_model(tmp_path):
    process = start("-m", "clipmb", "serve", "--port", "0", "--backend", "onnx", "--token", "abc", "--name", "emoji")
    try:
        said, _, url = process.stdout.readline().strip().rpartition(" ")
        assert said.endswith("emoji:"), excerpt(process.stderr.read())
        request = urllib.request.Request(f"{url}/v1/models", headers={"authorization": "Bearer abc"})
        with urllib.request.urlopen(request, timeout=HANG) as response:
            assert json.load(response)["data"][0]["id"] == "emoji"
    finally:
        process.terminate()
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, excerpt(errors)
    assert errors.startswith("Using the small model")
