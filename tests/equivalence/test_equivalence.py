"""Backend x head x case x field: the frameworks compute the same function, to rounding error.

Bounds are max|a - b| / max|b| against the first backend (PyTorch where it is tested). float64 at 1e-12 shows that two
implementations are one function; float32 allows for another order of the same sums.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from cases import (
    ALL_HEADS,
    CONFIGS,
    TEXT_HEADS,
    VISION_HEADS,
    config_of,
    image_inputs,
    random_arrays,
    relative,
    text_inputs,
    write_checkpoint,
)
from conftest import BACKENDS, ENGINES
from runners import (
    fields_of,
    flags_of,
    gradients,
    inputs_for,
    loaded,
    model_class,
    outputs,
    precision,
    typed,
)

from clipmb.backends import engine as engine_class
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.config import CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, specs
from clipmb.common.pretrained import read_weights
from clipmb.common.saving import Transaction
from clipmb.verification import BOUNDS

STANDARD, *OTHERS = BACKENDS
COMPILERS = {"pt": ["aot_eager"], "tf": ["graph", "xla"], "flax": ["jit"]}
POOLED = ("pooler_output", "text_embeds", "image_embeds")


def bound(field: str, dtype: str) -> float:
    pooled, other = BOUNDS[dtype]
    return pooled if field.endswith(POOLED) else other


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One random checkpoint for each head and case."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (head, case): write_checkpoint(root / f"{head}-{case}", config, head)
        for head in ALL_HEADS
        for case, config in CONFIGS.items()
    }


@pytest.fixture(scope="session")
def run(folders):
    """Outputs of a backend, computed once for each combination."""

    @functools.cache
    def run(backend, head, case, dtype, implementation):
        with loaded(backend, head, folders[head, case], dtype, attn_implementation=implementation) as model:
            return outputs(backend, model, inputs_for(head, case, dtype), **flags_of(head, implementation))

    return run


def differences(found, expected, limit) -> list[str]:
    """A line for each field that is missing, unexpected, or further away than its limit."""
    missing = [f"{field}: in one of both only" for field in sorted(found.keys() ^ expected.keys())]
    pairs = {field: relative(found[field], value) for field, value in expected.items() if field in found}
    return missing + [
        f"{field}: {difference:.1e} > {limit(field):.1e}"
        for field, difference in pairs.items()
        if not difference <= limit(field)
    ]


GRID = [
    (head, case, dtype, implementation)
    for head, case in itertools.product(ALL_HEADS, CONFIGS)
    for dtype, implementation in [*itertools.product(("float64", "float32"), ("eager", "sdpa")), ("bfloat16", "eager")]
    if dtype != "bfloat16" or case == "plain"
]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("head", "case", "dtype", "implementation"), GRID)
def test_outputs(run, backend, head, case, dtype, implementation):
    expected, found = (run(name, head, case, dtype, implementation) for name in (STANDARD, backend))
    assert list(expected) == fields_of(head, implementation)
    if dtype == "bfloat16":  # as near to the true values as the standard's bfloat16 is, but for a bit or so
        true = run(STANDARD, head, case, "float64", implementation)
        assert not differences(found, true, lambda field: 2 * relative(expected[field], true[field]) + 2**-8)
    else:
        assert not differences(found, expected, lambda field: bound(field, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fields_are_complete(run, backend, head, implementation):
    assert list(run(backend, head, "plain", "float64", implementation)) == fields_of(head, implementation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ALL_HEADS)
def test_fused_attention_is_eager_attention(run, backend, head):
    eager, fused = (run(backend, head, "stress", "float64", name) for name in ("eager", "sdpa"))
    shared = {field: eager[field] for field in fused}
    assert not differences(fused, shared, lambda field: 1e-12)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize(("dtype", "implementation"), [("float64", "eager"), ("float64", "sdpa"), ("float32", "sdpa")])
def test_gradients(folders, backend, head, case, dtype, implementation):
    """All gradients. PyTorch's fused kernels have their own for rows that a mask hides wholly; eager ones are right."""
    inputs = inputs_for(head, case, dtype, hidden_rows=implementation == "eager")

    def of(name):
        with loaded(name, head, folders[head, case], dtype, attn_implementation=implementation) as model:
            return gradients(name, model, inputs, **flags_of(head, implementation))

    expected, found = of(STANDARD), of(backend)
    assert found.keys() == expected.keys()
    assert sum(np.abs(value).max() > 0 for value in expected.values()) >= len(expected) - 2  # vision: post_layernorm
    for name, value in expected.items():
        # The gradient of a key's bias is zero but for rounding: softmax does not see it. Its query's is the scale.
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")]
        difference = np.abs(found[name] - value).max() / max(np.abs(scale).max(), np.finfo(np.float64).tiny)
        assert difference <= BOUNDS[dtype][1], f"{name}: {difference:.1e}"


@pytest.mark.parametrize(
    ("backend", "compiler"), [(name, compiler) for name in BACKENDS for compiler in COMPILERS[name]]
)
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_compiled(folders, run, backend, compiler, head, dtype):
    expected = run(backend, head, "stress", dtype, "sdpa")
    with loaded(backend, head, folders[head, "stress"], dtype, attn_implementation="sdpa") as model:
        found = outputs(backend, model, inputs_for(head, "stress", dtype), compiled=compiler, **flags_of(head, "sdpa"))
    assert not differences(found, expected, lambda field: bound(field, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", [head for head in ALL_HEADS if head != "CLIPModel"])
def test_a_batch_of_one_is_a_row_of_many(folders, run, backend, head):
    many = run(backend, head, "stress", "float64", "eager")
    inputs = inputs_for(head, "stress", "float64")
    with loaded(backend, head, folders[head, "stress"], "float64", attn_implementation="eager") as model:
        for row in range(5):
            one = outputs(backend, model, {k: v[row : row + 1] for k, v in inputs.items()}, **flags_of(head))
            for field, value in one.items():
                assert relative(value[0], many[field][row]) <= 1e-12, field


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("head", [*VISION_HEADS, "CLIPForImageClassification"])
@pytest.mark.parametrize("size", [(20, 20), (28, 20), (13, 38), (64, 4), (24, 24)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_interpolated_positions(folders, backend, head, size, dtype):
    """Against float64 in both dtypes, since PyTorch's own float32 is up to 1.9e-6 away from it here."""

    def of(name, dtype):
        inputs = typed(image_inputs(CONFIGS["stress"], 2, size), dtype)
        with loaded(name, head, folders[head, "stress"], dtype) as model:
            return outputs(name, model, inputs, interpolate_pos_encoding=True, output_hidden_states=True)

    expected, found = of(STANDARD, "float64"), of(backend, dtype)
    assert not differences(found, expected, lambda field: bound(field, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 20), (20, 0), (0, 0), (3, 20)])
def test_pictures_without_a_patch(folders, backend, size):
    inputs = image_inputs(CONFIGS["stress"], 2, size)
    refused = pytest.raises(ValueError, match=r"at least one patch.* Received: \(2, 3, ")
    with loaded(backend, "CLIPVisionModel", folders["CLIPVisionModel", "stress"], "float32") as model, refused:
        outputs(backend, model, inputs, interpolate_pos_encoding=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ALL_HEADS)
def test_numbers_of_parameters(folders, backend, head):
    """All are trainable, those that the loss does not depend on too: a classifier's post_layernorm."""
    table = specs(config_of(head, CONFIGS["plain"]), head)
    total = sum(math.prod(spec.shape) for spec in table)
    embeddings = sum(math.prod(spec.shape) for spec in table if spec.kind == "embedding")
    with loaded(backend, head, folders[head, "plain"], "float32") as model:
        assert model.num_parameters() == model.num_parameters(only_trainable=True) == total
        assert model.num_parameters(exclude_embeddings=True) == total - embeddings


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_features_without_the_rest_of_the_last_block(tmp_path, backend, case, layers):
    """Engines compute nothing in the last block but what is pooled, and find what the whole model finds."""
    fields = CONFIGS[case].to_dict()
    for tower in ("text_config", "vision_config"):
        fields[tower]["num_hidden_layers"] = layers
    config = CLIPConfig.from_dict(fields)
    texts, pixels = text_inputs(config, batch=5), image_inputs(config)["pixel_values"]
    ids, mask = texts["input_ids"], texts["attention_mask"]
    engine = engine_class(backend).load(write_checkpoint(tmp_path, config))
    for given in (mask, None):
        whole = engine.stages(ids, given, pixels)
        assert relative(engine.text_features(ids, given), whole["text.projected"]) <= 2e-6
    assert relative(engine.image_features(pixels), whole["vision.projected"]) <= 2e-6
    engine.free()


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("head", TEXT_HEADS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_and_absent_masks(folders, backend, head, rows, masked):
    inputs = text_inputs(CONFIGS["stress"], 5)
    inputs["position_ids"] = np.random.default_rng(3).integers(0, 13, (rows, 11))
    if not masked:
        del inputs["attention_mask"]

    def of(name):
        with loaded(name, head, folders[head, "stress"], "float64") as model:
            return outputs(name, model, inputs)

    assert not differences(of(backend), of(STANDARD), lambda field: 1e-12)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_masks_of_every_type(folders, backend, kind):
    inputs = text_inputs(CONFIGS["plain"], 5)
    inputs["attention_mask"] = inputs["attention_mask"].astype(kind)

    def of(name):
        with loaded(name, "CLIPTextModel", folders["CLIPTextModel", "plain"], "float64") as model:
            return outputs(name, model, inputs)

    assert not differences(of(backend), of(STANDARD), lambda field: 1e-12)


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize(("writer", "reader"), list(itertools.product(BACKENDS, BACKENDS)))
@pytest.mark.parametrize(("dtype", "size"), [("float32", "5GB"), ("float64", "60KB"), ("bfloat16", "5GB")])
def test_what_one_saves_another_loads(folders, tmp_path, head, writer, reader, dtype, size):
    with loaded(writer, head, folders[head, "stress"], dtype) as model:
        model.save_pretrained(tmp_path, max_shard_size=size)
    written = read_weights(Source(str(tmp_path)))
    original = read_weights(Source(str(folders[head, "stress"])))
    assert written.keys() == original.keys() == {spec.name for spec in specs(config_of(head, CONFIGS["stress"]), head)}
    if writer == "pt":
        assert {array.dtype.name for array in written.values()} == {dtype}
    for name, array in written.items():
        assert np.array_equal(array, original[name].astype(array.dtype)), name
    with precision(reader, dtype):
        again = model_class(reader, head).from_pretrained(tmp_path, dtype=dtype)
        for name, array in again.to_arrays().items():
            assert np.array_equal(array, written[name].astype(array.dtype)), name


# -- deliberate faults: each of them must be seen ---------------------------------------------------------------------


def swap(arrays, first, second):
    for name in list(arrays):
        if first in name:
            other = name.replace(first, second)
            arrays[name], arrays[other] = arrays[other], arrays[name]


FAULTS = {
    "transposed square weight": lambda a: a.update(
        {k: v.T for k, v in a.items() if k.endswith("layers.1.self_attn.v_proj.weight")}
    ),
    "dropped bias": lambda a: a.update(
        {k: v * 0 for k, v in a.items() if k.endswith("layers.0.self_attn.q_proj.bias")}
    ),
    "swapped norms": lambda a: swap(a, "layer_norm1", "layer_norm2"),
    "swapped patch height and width": lambda a: a.update(
        {k: v.transpose(0, 1, 3, 2) for k, v in a.items() if "patch_embedding" in k}
    ),
    "off-by-one position": lambda a: a.update({k: np.roll(v, 1, 0) for k, v in a.items() if "position_embedding" in k}),
    "swapped query and key": lambda a: swap(a, "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"),
    "one weight off by a thousandth": lambda a: a.update(
        {
            k: v + 1e-3 * (np.arange(v.size) == 7).reshape(v.shape).astype(v.dtype)
            for k, v in a.items()
            if "fc2.weight" in k
        }
    ),
    "scale of the logits": lambda a: a.update(logit_scale=a["logit_scale"] + np.float32(1e-3)),
}
CONFIG_FAULTS = {
    "tanh gelu": {"hidden_act": "gelu_new"},
    "wrong epsilon": {"layer_norm_eps": 0.1001},
    "quick gelu": {"hidden_act": "quick_gelu"},
}
SEEN_BY = {"swapped patch height and width": ("image_embeds",), "scale of the logits": ("logits_per_image",)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", [*FAULTS, *CONFIG_FAULTS, "pooling at the wrong token"])
def test_faults_are_seen(folders, tmp_path, run, backend, fault):
    config = CONFIGS["stress"]
    arrays = random_arrays(config, "CLIPModel")
    changes = CONFIG_FAULTS.get(fault, {})
    text = {"eos_token_id": 97} if fault == "pooling at the wrong token" else changes
    if fault in FAULTS:
        FAULTS[fault](arrays)
    fields = config.to_dict()
    fields["text_config"].update(text)
    fields["vision_config"].update(changes)
    with Transaction(tmp_path) as save:
        save.write("config.json", type(config).from_dict(fields).to_json_string())
        write_safetensors(save, arrays)
    expected = run(STANDARD, "CLIPModel", "stress", "float32", "eager")
    with loaded(backend, "CLIPModel", tmp_path, "float32", attn_implementation="eager") as model:
        found = outputs(backend, model, inputs_for("CLIPModel", "stress", "float32"), **flags_of("CLIPModel"))
    seen = {field for field, value in expected.items() if relative(found[field], value) > bound(field, "float32")}
    default = ("text_embeds",) if fault == "pooling at the wrong token" else ("text_embeds", "image_embeds")
    for field in (*SEEN_BY.get(fault, default), "logits_per_image"):
        assert field in seen


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "pt"])
@pytest.mark.parametrize(
    ("kind", "axes"), [("convolution", (3, 2, 1, 0)), ("linear", ())], ids=["conv height and width", "square linear"]
)
def test_faults_of_the_table_are_seen(folders, tmp_path, run, monkeypatch, backend, kind, axes):
    """The layouts of Keras and linen themselves: a swapped convolution, a linear weight that is not transposed."""
    head = "CLIPVisionModelWithProjection"
    expected = run(backend, head, "stress", "float32", "eager")
    square = {"projection_dim": 48, "intermediate_size": 48}
    folder = folders[head, "stress"]
    if kind == "linear":  # every linear weight is square, so that nothing but the values can tell
        config = type(CONFIGS["stress"]).from_dict(
            {**CONFIGS["stress"].to_dict(), "vision_config": {**CONFIGS["stress"].vision_config.to_dict(), **square}}
        )
        folder = write_checkpoint(tmp_path, config, head)
        with loaded(backend, head, folder, "float32", attn_implementation="eager") as model:
            expected = outputs(backend, model, inputs_for(head, "stress", "float32"), **flags_of(head))
    monkeypatch.setitem(KINDS, kind, KINDS[kind]._replace(axes=axes))
    with loaded(backend, head, folder, "float32", attn_implementation="eager") as model:
        found = outputs(backend, model, inputs_for(head, "stress", "float32"), **flags_of(head))
    assert relative(found["image_embeds"], expected["image_embeds"]) > 1e-3


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_training_with_next_to_no_dropout_is_evaluation(folders, backend, head, implementation, masked):
    """Whatever path dropout takes, masks and all else stay; at 1e-9 nothing is dropped."""
    inputs = inputs_for(head, "stress", "float64")
    if not masked:
        inputs.pop("attention_mask", None)
    rate = {"attention_dropout": 1e-9}
    changes = (
        {"text_config": rate, "vision_config": rate} if head in ("CLIPModel", "CLIPForImageClassification") else rate
    )
    with loaded(
        backend, head, folders[head, "stress"], "float64", attn_implementation=implementation, **changes
    ) as model:
        expected = outputs(backend, model, inputs)
        found = outputs(backend, model, inputs, training=True)
    assert not differences(found, expected, lambda field: 1e-8)
