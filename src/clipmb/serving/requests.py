"""What clients send: JSON and queries, checked, with the errors that they get."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

from clipmb.common.errors import bad_input, whole_number
from clipmb.embedding.store import KINDS

_DATA_URI = re.compile(r"\s*data:([^,]*),", re.IGNORECASE)
_NOT_FETCHED = "Nothing is fetched from elsewhere: send the image itself, as data:image/jpeg;base64,…"
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refused(Exception):
    """A request that gets an error as its answer, in the form of OpenAI's.

    Args:
        status: Of the response.
        message: What is wrong, and what to do.
        code: A word for programs.
        param: The field of the request at fault.
        headers: Further headers of the response.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = _TYPES.get(status, "invalid_request_error")
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(param: str | None, error: Exception | str, code: str = "invalid_value") -> Refused:
    """Returns the answer to a request with a field that is wrong."""
    return Refused(400, str(error), code, param)


class Input(NamedTuple):
    """One text or image of a request.

    Attributes:
        kind: "text" or "image".
        value: The text, or the data URI of the image.
        param: Where it stands in the request.
    """

    kind: str
    value: str
    param: str


@dataclass(frozen=True)
class Embeddings:
    """A request for embeddings, of OpenAI's form or one of its extensions."""

    inputs: list[Input]
    base64: bool

    @classmethod
    def of(cls, body: Mapping[str, Any], model: str, dimension: int) -> Embeddings:
        """Checks a request.

        Args:
            body: Its JSON object.
            model: The model that is served.
            dimension: Numbers of an embedding.

        Raises:
            Refused: A field is wrong, missing, or asks for what cannot be had.
        """
        known = ("model", "input", "messages", "modality", "encoding_format", "dimensions", "user")
        body = check_fields(body, known)
        check_model(body, model)
        encoding = body.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            rule = "encoding_format must be 'float' or 'base64'"
            raise invalid("encoding_format", bad_input(rule, encoding, "Pass one of these"))
        if body.get("dimensions", dimension) != dimension or isinstance(body.get("dimensions"), bool):
            rule = f"The embeddings of this model have {dimension} numbers and cannot be shortened"
            raise invalid("dimensions", bad_input(rule, body["dimensions"], "Leave dimensions out"))
        modality = body.get("modality", "text")
        if modality not in ("text", "image"):
            rule = "modality must be 'text' or 'image'"
            raise invalid("modality", bad_input(rule, modality, "Pass one of these"))
        if ("input" in body) == ("messages" in body):
            given = "both" if "input" in body else "neither"
            rule = "A request has either input or messages"
            raise invalid("input", bad_input(rule, given, "Pass one of them", shown=True))
        if "messages" in body:
            if "modality" in body:
                rule = "modality is for input: the parts of messages have types"
                raise invalid("modality", bad_input(rule, modality, "Leave modality out"))
            inputs = [_of_messages(body["messages"])]
        else:
            inputs = listed(body["input"], modality, "input")
        return cls(inputs, encoding == "base64")


@dataclass(frozen=True)
class Classification:
    """A request for the probabilities of labels."""

    images: list[Input]
    labels: list[str]
    templates: str | list[str] | None

    @classmethod
    def of(cls, body: Mapping[str, Any], model: str) -> Classification:
        """Checks a request.

        Args:
            body: Its JSON object.
            model: The model that is served.

        Raises:
            Refused: A field is wrong or missing.
        """
        body = check_fields(body, ("model", "images", "labels", "templates"))
        check_model(body, model)
        for name in ("images", "labels"):
            if name not in body:
                raise invalid(name, bad_input(f"A classification needs {name}", None, f"Pass {name}"))
        templates = body.get("templates")
        if not (templates is None or isinstance(templates, str) or _all_texts(templates)):
            rule = "templates must be a text or a list of texts"
            raise invalid("templates", bad_input(rule, templates, "Pass for example 'a photo of a {}.'"))
        if not _all_texts(body["labels"]) or len(set(body["labels"])) != len(body["labels"]):
            rule = "labels must be a list of texts that are all different"
            raise invalid("labels", bad_input(rule, body["labels"], "Pass for example ['cat', 'dog']"))
        return cls(listed(body["images"], "image", "images"), body["labels"], templates)


@dataclass(frozen=True)
class Search:
    """A request for the most similar rows of an index."""

    plus: list[Input]
    minus: list[Input]
    k: int
    kind: str
    where: list[str]

    @classmethod
    def of(cls, body: Mapping[str, Any], most: int) -> Search:
        """Checks a request.

        Args:
            body: Its JSON object.
            most: The most results.

        Raises:
            Refused: A field is wrong or missing.
        """
        body = check_fields(body, ("text", "image", "minus_text", "minus_image", "k", "kind", "where"))
        given: dict[str, list[Input]] = {
            name: listed(body[name], name.removeprefix("minus_"), name) if body.get(name, []) != [] else []
            for name in ("text", "image", "minus_text", "minus_image")
        }
        plus = given["text"] + given["image"]
        if not plus:
            raise invalid("text", bad_input("A search needs a text or an image", "neither", "Pass one", shown=True))
        try:
            k = whole_number("k", body.get("k", 10), 1, most)
        except ValueError as error:
            raise invalid("k", error) from None
        kind = body.get("kind", KINDS[0])
        if kind not in KINDS:
            rule = f"kind must be one of {', '.join(KINDS)}"
            raise invalid("kind", bad_input(rule, kind, "Pass one of these"))
        where = body.get("where", [])
        where = [where] if isinstance(where, str) else where
        if not _all_texts(where) and where != []:
            rule = "where must be a condition or a list of conditions"
            raise invalid("where", bad_input(rule, where, "Pass for example 'label=cat'"))
        return cls(plus, given["minus_text"] + given["minus_image"], k, kind, where)

    @classmethod
    def of_query(cls, query: bytes, most: int) -> Search:
        """Checks the query of a URL: ``q``, ``minus`` and ``where``, each once or more, ``k`` and ``kind``.

        Raises:
            Refused: A field is wrong, missing, or there twice, or the query is not UTF-8.
        """
        try:
            pairs = parse_qsl(query.decode(), keep_blank_values=True, errors="strict")
        except UnicodeDecodeError as error:
            raise invalid(None, bad_input("A query must be UTF-8", str(error), "Encode it again", shown=True)) from None
        names = {"q": "text", "minus": "minus_text", "where": "where", "k": "k", "kind": "kind"}
        body: dict[str, Any] = {}
        for name, value in pairs:
            if name not in names:
                raise _unknown(name, names)
            if name in ("k", "kind"):
                if name in body:
                    raise invalid(name, bad_input(f"{name} may be there once", value, f"Pass one {name}"))
                body[name] = int(value) if name == "k" and re.fullmatch("[0-9]{1,9}", value) else value
            else:
                body.setdefault(names[name], []).append(value)
        return cls.of(body, most)


def json_object(content: bytes) -> dict[str, Any]:
    """Reads the body of a request.

    Raises:
        Refused: It is not JSON, or no object.
    """
    try:
        body = json.loads(content, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body must be JSON. Received: {error}. Correct it.", "invalid_json") from None
    if not isinstance(body, dict):
        fix = 'Pass for example {"input": "a cat"}'
        raise Refused(400, str(bad_input("The body must be a JSON object", body, fix)), "invalid_json")
    return body


def check_fields(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Refuses fields that would have no effect; returns the others but those that are null, which is as left out."""
    for name in body:
        if name not in known:
            raise _unknown(name, known)
    return {name: value for name, value in body.items() if value is not None}


def check_model(body: Mapping[str, Any], model: str) -> None:
    """Refuses another model than the one that is served; it may be left out."""
    if "model" in body and body["model"] != model:
        rule = f"This server has one model, {model!r}"
        raise Refused(404, str(bad_input(rule, body["model"], "Pass its name as model")), "model_not_found", "model")


def listed(value: Any, kind: str, param: str) -> list[Input]:
    """Returns the inputs that a text, or a list of texts, stands for.

    Args:
        value: The field.
        kind: "text" or "image".
        param: The name of the field.

    Raises:
        Refused: It is something else, an empty list or an empty text.
    """
    if isinstance(value, str):
        return [_input(value, kind, param)]
    if kind == "text" and _are_ids(value):
        rule = f"{param} must be text: ids of tokens mean something to one tokenizer only"
        raise invalid(param, bad_input(rule, value, "Send the text"))
    if not isinstance(value, list) or not value:
        what = "a text or a list of texts" if kind == "text" else "the data URI of an image, or a list of them"
        raise invalid(param, bad_input(f"{param} must be {what}, not empty", value, "Correct it"))
    return [_input(item, kind, f"{param}[{number}]") for number, item in enumerate(value)]


def image_bytes(given: Input) -> bytes:
    """Returns what a data URI holds.

    Raises:
        Refused: It is no data URI, or its base64 is damaged.
    """
    found = _DATA_URI.match(given.value[:1000])
    if found is None:
        raise invalid(given.param, bad_input("An image must be a data URI", given.value[:80], _NOT_FETCHED[:-1]))
    content = given.value[found.end() :]
    in_base64 = re.search(r";\s*base64\s*$", found[1], re.IGNORECASE)
    try:
        if in_base64 and "%" not in content:
            return base64.b64decode("".join(content.split()), validate=True)
        plain = unquote_to_bytes(content.encode("ascii"))
        return base64.b64decode(b"".join(plain.split()), validate=True) if in_base64 else plain
    except ValueError as error:
        rule, fix = (
            "The base64 of a data URI must be whole",
            "Encode the image again, with + and / and the = at its end",
        )
        if not in_base64:
            rule, fix = "A data URI must be ASCII", "Write other bytes as % and two digits"
        raise invalid(given.param, bad_input(rule, str(error), fix, shown=True)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} twice in one object")
        found[name] = value
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")


def _are_ids(value: Any) -> bool:
    lists = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    return all(isinstance(ids, list) and ids and all(isinstance(one, int) for one in ids) for ids in lists)


def _input(value: Any, kind: str, param: str) -> Input:
    if not isinstance(value, str):
        what = "a text" if kind == "text" else "the data URI of an image"
        raise invalid(param, bad_input(f"{param} must be {what}", value, "Pass a string"))
    if not value.strip():
        raise invalid(param, bad_input(f"{param} must not be empty", value, "Leave it out"))
    if kind == "image" and re.match(r"https?:", value, re.IGNORECASE):
        raise invalid(param, bad_input("An image must be a data URI", value, _NOT_FETCHED), "url_not_fetched")
    if kind == "text" and re.match(r"\s*data:image/[^,]{1,200},", value, re.IGNORECASE):
        fix = "Say that it is an image, by modality, an image_url or the field image"
        raise invalid(param, bad_input(f"{param} must be a text, and holds an image", value[:80], fix))
    return Input(kind, value, param)


def _of_messages(messages: Any) -> Input:
    """Returns the one part of a conversation, as vLLM takes it for models of this kind."""
    parts: list[tuple[str, Any]] = []
    fix = "Pass [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'data:…'}}]}]"
    for i, message in enumerate(messages if isinstance(messages, list) else [messages]):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"} or message["role"] != "user":
            raise invalid(where, bad_input("A message has the role 'user' and a content", message, fix))
        content = message["content"]
        if isinstance(content, str):
            parts.append((f"{where}.content", {"type": "text", "text": content}))
        elif isinstance(content, list):
            parts += [(f"{where}.content[{j}]", part) for j, part in enumerate(content)]
        else:
            raise invalid(f"{where}.content", bad_input("A content is a text or a list of parts", content, fix))
    if len(parts) != 1:
        rule = "The messages of a request must have one part, a text or an image: each has its own embedding"
        raise invalid("messages", bad_input(rule, f"{len(parts)} parts", "Send a request for each", shown=True))
    where, part = parts[0]
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and part.keys() == {"type", "text"}:
        return _input(part["text"], "text", f"{where}.text")
    if kind == "image_url" and part.keys() == {"type", "image_url"}:
        image = part["image_url"]
        fields = image.keys() if isinstance(image, dict) else set()
        if "url" in fields <= {"url", "detail"} and image.get("detail") in (None, "auto"):
            return _input(image["url"], "image", f"{where}.image_url.url")
    raise invalid(where, bad_input("A part is a text or an image_url with a url", part, fix))


def _all_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def _unknown(name: str, known: Collection[str]) -> Refused:
    return invalid(name, bad_input(f"There is no field {name!r}", name, f"Leave it out; there are {', '.join(known)}"))
