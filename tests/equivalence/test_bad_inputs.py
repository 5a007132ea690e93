"""Bad input gets the same error with the same words in every framework, eagerly and from compiled engines."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import CONFIGS, text_inputs, write_checkpoint
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
def test_complex_pixels(folders, backend):
    with (
        loaded(backend, "CLIPForImageClassification", folders["CLIPForImageClassification"], "float32") as model,
        pytest.raises(TypeError, match=r"pixel_values must be real numbers\. Received: complex64\. Pass float32\."),
    ):
        model(**tensors(backend, {"pixel_values": PIXELS.astype(np.complex64)}))


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


GIVEN = {"pixels": np.random.default_rng(0).integers(0, 9, (2, 3, 20, 20)).astype(np.float32)}
GIVEN |= dict(zip(("ids", "mask"), text_inputs(PLAIN, 3).values(), strict=True))
INTEGERS = [*"bBhHiIlL", ">i2", ">u4", ">i8", ">u8", "<i8"]
NUMBERS = [*INTEGERS, *"efdg", ">f2", ">f4", ">f8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
LAYOUTS = (
    lambda array: array[..., ::-1].copy()[..., ::-1],
    lambda array: np.repeat(array, 2, -1)[..., ::2],
    lambda array: np.broadcast_to(array, array.shape),  # which cannot be written to
    np.asfortranarray,
    np.ma.array,
    np.ndarray.tolist,
)


def image(engine, **new):
    return engine.image_features(new.get("pixels", GIVEN["pixels"]))


def text(engine, **new):
    return engine.text_features(*({**GIVEN, **new}[field] for field in ("ids", "mask")))


def logits(engine, **new):
    return engine.stages(*({**GIVEN, **new}[field] for field in ("ids", "mask", "pixels")))["logits"]


METHODS = {"pixels": image, "ids": text, "mask": text}


@pytest.fixture
def engine(folders, request, monkeypatch):
    backend, compile = request.param
    if backend == "pt":
        import torch

        monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # it sees tensors only
    return backends.engine(backend).load(folders["CLIPModel"], compile=compile)


COMPILED = pytest.mark.parametrize(
    "engine", [(name, c) for name in ENGINES for c in (False, True)], indirect=True, ids=str
)


@COMPILED
def test_engines_take_numbers_of_every_dtype_and_layout(engine):
    expected = {method: method(engine) for method in (image, text, logits)}
    for field, method in METHODS.items():
        for dtype in INTEGERS if field == "ids" else [*NUMBERS, "?"] if field == "mask" else NUMBERS:
            found = method(engine, **{field: GIVEN[field].astype(dtype)})
            np.testing.assert_array_equal(found, expected[method], err_msg=f"{field} {dtype}")
    swapped = {field: array.astype(array.dtype.newbyteorder()) for field, array in GIVEN.items()}
    for new in (swapped, *({field: change(array) for field, array in GIVEN.items()} for change in LAYOUTS)):
        for method, wanted in expected.items():
            np.testing.assert_array_equal(method(engine, **new), wanted)


@pytest.mark.parametrize("backend", ENGINES)
def test_engines_of_float64_keep_the_bits_of_their_pixels(folders, backend):
    engine = backends.engine(backend).load(folders["CLIPModel"], dtype="float64")
    pixels = GIVEN["pixels"].astype(np.float64) / 3
    expected = engine.image_features(pixels)
    assert expected.dtype == np.float64
    for same in (">f8", np.longdouble):
        np.testing.assert_array_equal(engine.image_features(pixels.astype(same)), expected)
    assert np.abs(engine.image_features(pixels.astype(np.float32)) - expected).max() > 0


@COMPILED
def test_engines_refuse_what_are_no_numbers(engine):
    rules = {
        "pixels": "pixel_values must be real numbers. Received: {}. Pass float32.",
        "ids": "input_ids must be integers. Received: {}. Pass int32 or int64.",
        "mask": "attention_mask must be real numbers. Received: {}. Pass int64.",
    }
    for field, words in rules.items():
        for method in (METHODS[field], logits):
            for dtype in ("complex64", "complex128", "object", "str256", "timedelta64[s]"):
                array = GIVEN[field].astype("U8" if dtype == "str256" else dtype)
                with pytest.raises(TypeError) as error:
                    method(engine, **{field: array})
                assert str(error.value) == words.format(dtype)
            with pytest.raises(
                ValueError, match=r"must have a value everywhere. Received: an array with masked values"
            ):
                method(engine, **{field: np.ma.masked_equal(GIVEN[field], GIVEN[field].max())})
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 99\). Received: values from 9223372036854775\d"):
        text(engine, ids=GIVEN["ids"].astype(np.uint64) + np.uint64(2**63))


def test_shapes_that_are_not_known_before_the_call():
    class Symbolic:
        dtype = np.dtype("int64")

        def __init__(self, *shape):
            self.shape = shape

    config = CONFIGS["plain"]
    assert checks.loss_kind(Symbolic(None), Symbolic(None, 7), config) == "single_label_classification"
    with pytest.raises(ValueError, match=r"labels must have the shape \(4,\)"):
        checks.loss_kind(Symbolic(5), Symbolic(4, 7), config)
