"""Bad input gets the same error with the same words in every framework, eagerly and from compiled engines."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CONFIGS, write_checkpoint
from conftest import BACKENDS, ENGINES
from runners import loaded, numpy, tensors

from clipmb import backends
from clipmb.common import checks

PLAIN = CONFIGS["plain"]
PIXELS = np.zeros((4, 3, 20, 20), np.float32)
INDICES = np.array([0, 1, 2, 3])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        head: write_checkpoint(tmp_path_factory.mktemp(head), PLAIN, head)
        for head in ("CLIPModel", "CLIPTextModel", "CLIPForImageClassification")
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids(folders, backend):
    ids = np.array([[1, 2, 3], [3, 2, 1]])
    for given, kind, message in (
        (
            {"input_ids": ids.astype(np.float32)},
            TypeError,
            "input_ids must be integers. Received: float32. Pass int32 or int64.",
        ),
        ({"input_ids": ids > 1}, TypeError, "input_ids must be integers. Received: bool. Pass int32 or int64."),
        (
            {"input_ids": ids, "position_ids": ids.astype(np.float32)},
            TypeError,
            "position_ids must be integers. Received: float32. Pass int32 or int64.",
        ),
        (
            {"input_ids": ids - 2},
            ValueError,
            "input_ids must lie in [0, 99). Received: values from -1 to 1. Use the tokenizer of this model.",
        ),
        (
            {"input_ids": ids, "position_ids": ids + 20},
            ValueError,
            "position_ids must lie in [0, 13). Received: values from 21 to 23. Pass smaller positions.",
        ),
    ):
        with loaded(backend, "CLIPTextModel", folders["CLIPTextModel"], "float32") as model:
            with pytest.raises(kind) as error:
                model(**tensors(backend, given))
            assert str(error.value) == message
            for narrow in (np.int8, np.uint8, np.int16):
                model(**tensors(backend, {"input_ids": ids.astype(narrow)}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels(folders, backend):
    with loaded(backend, "CLIPForImageClassification", folders["CLIPForImageClassification"], "float32") as model:

        def loss(labels):
            return float(numpy(model(**tensors(backend, {"pixel_values": PIXELS, "labels": labels})).loss))

        for labels, problem, kind, message in (
            (
                np.array([0, -100, 2, 7]), None, ValueError,
                "labels must lie in [0, 7). Received: values from 0 to 7. "
                "Pass class indices, or -100 for what is to be left out.",
            ),
            (
                INDICES[:3], None, ValueError,
                "labels must have the shape (4,) for single_label_classification. Received: (3,). "
                "Pass labels of that shape.",
            ),
            (
                np.zeros((7, 4), np.float32), None, ValueError,
                "labels must have the shape (4, 7) for multi_label_classification. Received: (7, 4). "
                "Pass labels of that shape.",
            ),
            (
                np.zeros(4, np.float32), "regression", ValueError,
                "labels must have the shape (4, 7) for regression. Received: (4,). Pass labels of that shape.",
            ),
            (
                INDICES.astype(np.float32), "single_label_classification", TypeError,
                "labels must be integers. Received: float32. Pass int32 or int64.",
            ),
        ):  # fmt: skip
            model.config.problem_type = problem
            with pytest.raises(kind) as error:
                loss(labels)
            assert str(error.value) == message
        model.config.problem_type = None
        expected = loss(INDICES)
        for same in (INDICES.astype(np.int32), INDICES.astype(np.uint8), INDICES[:, None]):
            assert loss(same) == pytest.approx(expected, rel=1e-6)
        assert loss(np.eye(7, dtype=bool)[INDICES]) == pytest.approx(
            loss(np.eye(7, dtype=np.float32)[INDICES]), rel=1e-6
        )


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("backend", ENGINES)
def test_engines_check_ids(folders, backend, compile, monkeypatch):
    if backend == "pt":
        import torch

        monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the check comes before it
    engine = backends.engine(backend).load(folders["CLIPModel"], compile=compile)
    asked = (engine.model, "run") if backend == "onnx" else (engine, "_text")
    monkeypatch.setattr(*asked, lambda *given, **inputs: pytest.fail("the model saw them"))
    for ids in ([[1, 99]], [[-1, 2]]):
        with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 99\)"):
            engine.text_features(np.array(ids))
    with pytest.raises(TypeError, match="input_ids must be integers"):
        engine.text_features(np.array([[1.0, 2.0]]))


IDS = np.ones((2, 5), np.int64)
SHAPES = [
    *((np.ones(shape, np.int64), None, "input_ids must have the shape") for shape in [(), (5,), (1, 2, 5)]),
    (IDS[:, :0], None, "at least one token"),
    (np.ones((1, 14), np.int64), None, "Sequence length must be at most"),
    *((IDS, np.ones(shape), "attention_mask must have the shape") for shape in [(), (5,), (1, 5), (2, 4), (2, 5, 1)]),
    *((PIXELS[index], None, words) for index, words in [
        ((0,), "pixel_values must have the shape"), ((0, 0, 0, 0), "pixel_values must have the shape"),
        ((slice(None), slice(2)), "pixel_values must have the shape"), ((..., slice(5)), "doesn't match model"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("backend", ENGINES)
def test_engines_check_shapes(folders, backend, compile, monkeypatch):
    if backend == "pt":
        import torch

        monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the check comes before it
    engine = backends.engine(backend).load(folders["CLIPModel"], compile=compile)
    for array, mask, words in SHAPES:
        array = np.asarray(array)
        with pytest.raises(ValueError, match=words):
            engine.image_features(array) if array.dtype == PIXELS.dtype else engine.text_features(array, mask)


def test_shapes_that_are_not_known_before_the_call():
    class Symbolic:
        dtype = np.dtype("int64")

        def __init__(self, *shape):
            self.shape = shape

    config = CONFIGS["plain"]
    assert checks.loss_kind(Symbolic(None), Symbolic(None, 7), config) == "single_label_classification"
    with pytest.raises(ValueError, match=r"labels must have the shape \(4,\)"):
        checks.loss_kind(Symbolic(5), Symbolic(4, 7), config)
