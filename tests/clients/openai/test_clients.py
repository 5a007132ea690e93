"""OpenAI's client and LangChain's embeddings, as they are installed, with a server of ours."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import openai
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from processes import HANG, excerpt, start

import clipmb

TEXTS = ["an emoji of a rocket", "an emoji of a panda", "a pizza"]
pytestmark = pytest.mark.filterwarnings("default")  # theirs


@pytest.fixture(scope="module")
def server():
    process = start("-m", "clipmb", "serve", "--port", "0", "--name", "emoji", "--token", "a-secret")
    line = process.stdout.readline().strip()
    assert "http://" in line, excerpt(process.stderr.read())
    yield {"base_url": line.rpartition(" ")[2] + "/v1", "api_key": "a-secret"}
    process.terminate()
    process.communicate(timeout=HANG)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(**server, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline():
    return clipmb.CLIPPipeline.from_pretrained(clipmb.small_model())


@pytest.fixture(scope="module")
def expected(pipeline):
    return pipeline.encode_text(TEXTS)


@pytest.mark.parametrize("form", [{}, {"encoding_format": "base64"}, {"encoding_format": "float"}, {"dimensions": 128}])
def test_embeddings(client, expected, form):
    """Without a format the client asks for base64 and gives numbers."""
    answer = client.embeddings.create(model="emoji", input=TEXTS, **form)
    assert [row.index for row in answer.data] == [0, 1, 2]
    found = [row.embedding for row in answer.data]
    if form == {"encoding_format": "base64"}:
        found = [np.frombuffer(base64.b64decode(row), "<f4") for row in found]
    assert np.abs(np.array(found) - expected).max() < 1e-6
    assert (answer.model, answer.object) == ("emoji", "list")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    alone = client.embeddings.create(model="emoji", input=TEXTS[1], **form)
    assert len(alone.data) == 1


def test_images(client, pipeline):
    picture, content = clipmb.held_out_pictures()[0][0], io.BytesIO()
    picture.save(content, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    answer = client.embeddings.create(model="emoji", input=[uri], extra_body={"modality": "image"})
    assert np.abs(np.array(answer.data[0].embedding) - pipeline.encode_image([picture])).max() < 1e-6


def test_models(client):
    assert [model.id for model in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").id == "emoji"


def test_many_at_once(server, expected):
    async def run():
        async with openai.AsyncOpenAI(**server, max_retries=0) as client:
            asked = (client.embeddings.create(model="emoji", input=TEXTS[i % 3]) for i in range(60))
            return await asyncio.gather(*asked)

    for i, answer in enumerate(asyncio.run(run())):
        assert np.abs(np.array(answer.data[0].embedding) - expected[i % 3]).max() < 1e-6


@pytest.mark.parametrize(
    ("changed", "error", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"input": [[1, 2, 3]]}, openai.BadRequestError, "invalid_value", "input"),
        ({"input": ""}, openai.BadRequestError, "invalid_value", "input"),
        ({"dimensions": 64}, openai.BadRequestError, "invalid_value", "dimensions"),
        ({"extra_body": {"colour": 1}}, openai.BadRequestError, "invalid_value", "colour"),
    ],
)
def test_errors_are_those_of_the_client(client, changed, error, code, param):
    with pytest.raises(error) as caught:
        client.embeddings.create(**{"model": "emoji", "input": "a cat", **changed})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert "Received" in caught.value.message


def test_a_wrong_key(server):
    other = openai.OpenAI(**{**server, "api_key": "another"}, max_retries=0)
    with other, pytest.raises(openai.AuthenticationError) as caught:
        other.models.list()
    assert caught.value.code == "invalid_api_key"


def test_langchain(server, expected):
    given = {**server, "model": "emoji", "max_retries": 0}
    embeddings = OpenAIEmbeddings(**given, check_embedding_ctx_length=False)
    assert np.abs(np.array(embeddings.embed_documents(TEXTS)) - expected).max() < 1e-6
    assert np.abs(np.array(embeddings.embed_query(TEXTS[0])) - expected[0]).max() < 1e-6
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    assert [document.page_content for document in store.similarity_search("a rocket", k=1)] == TEXTS[:1]
