"""Every Flax head against clipmb's PyTorch models, and the four that transformers 4.57.6 has against those."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import ALL_HEADS, CONFIGS, config_of, image_inputs, inputs_of, relative, text_inputs, write_checkpoint
from flax.traverse_util import flatten_dict
from torch.nn import functional as F

from clipmb import flax, pt
from clipmb.common.config import ACTIVATIONS as NAMES
from clipmb.common.parameters import KINDS, specs
from clipmb.flax.layers import ACTIVATIONS, bicubic_weights, interpolate_positions
from clipmb.flax.losses import classification_loss
from clipmb.pt.layers import ACTIVATIONS as TORCH_ACTIVATIONS
from clipmb.pt.losses import classification_loss as torch_loss

FORMER = ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel")
# Embeddings; hidden states, logits and gradients.
BOUNDS = {"float32": (2e-6, 1e-5), "float64": (1e-12, 1e-12)}


@pytest.fixture(autouse=True)
def x64(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    jax.config.update("jax_enable_x64", parameters.get("dtype") == "float64")
    yield
    jax.config.update("jax_enable_x64", False)


def pair(tmp_path, head, config, dtype, implementation):
    folder = write_checkpoint(tmp_path / head, config, head)
    options = {"dtype": dtype, "attn_implementation": implementation}
    ours = getattr(flax, "Flax" + head).from_pretrained(folder, **options)
    ours.params = jax.tree.map(lambda leaf: leaf.astype(dtype), ours.params)
    return ours, getattr(pt, head).from_pretrained(folder, **options)


def both(inputs, dtype):
    inputs = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in inputs.items()}
    return inputs, {name: torch.from_numpy(value) for name, value in inputs.items()}


def fields(output, prefix=""):
    """Every array of an output by its path."""
    found = {}
    for name, value in output.items():
        if isinstance(value, tuple):
            found.update({f"{prefix}{name}.{i}": part for i, part in enumerate(value)})
        elif hasattr(value, "items"):
            found.update(fields(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return {name: _numpy(value) for name, value in found.items()}


def _numpy(value):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def assert_close(ours, theirs, dtype):
    ours, theirs = fields(ours), fields(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        pooled = name.endswith(("_embeds", "pooler_output"))
        assert ours[name].dtype == value.dtype == np.dtype(dtype), name
        assert relative(ours[name], value) < BOUNDS[dtype][0 if pooled else 1], name


@pytest.mark.parametrize(
    ("case", "head", "dtype", "implementation"),
    [
        *(("stress", head, "float64", "eager") for head in ALL_HEADS),
        *(("plain", head, "float32", "sdpa") for head in ALL_HEADS),
        *((case, "CLIPModel", "float64", "sdpa") for case in ("plain", "legacy eos")),
    ],
)
def test_outputs(tmp_path, case, head, dtype, implementation):
    ours, theirs = pair(tmp_path, head, CONFIGS[case], dtype, implementation)
    own, other = both(inputs_of(head, CONFIGS[case], 5), dtype)
    options = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    if head == "CLIPModel":
        options["return_loss"] = True
    assert_close(ours(**own, **options), theirs(**other, **options), dtype)


@pytest.mark.parametrize(
    ("head", "dtype", "implementation"),
    [*((head, "float64", "eager") for head in ALL_HEADS), *((head, "float32", "sdpa") for head in ALL_HEADS[:2])],
)
def test_gradients(tmp_path, head, dtype, implementation):
    config = CONFIGS["stress"]
    ours, theirs = pair(tmp_path, head, config, dtype, implementation)
    # Where a query sees only padding, the gradients of PyTorch's fused attention are wrong, by a factor of 143 here.
    theirs.set_attn_implementation("eager")
    own, other = both(inputs_of(head, config), dtype)

    def loss(output):
        return output.loss if head == "CLIPModel" else sum((value**3).mean() for value in output.values())

    options = {"return_loss": True} if head == "CLIPModel" else {}
    gradients = jax.jit(jax.grad(lambda params: loss(ours(**own, params=params, **options))))(ours.params)
    loss(theirs(**other, **options)).backward()
    found = flatten_dict(gradients)
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters() if parameter.grad is not None)
    for spec in specs(config_of(head, config), head):
        expected = theirs.get_parameter(spec.name).grad
        gradient = KINDS[spec.kind].to_canonical(np.asarray(found[spec.path("flax")]))
        if expected is None:  # the post layer norm does not reach the classifier
            assert not gradient.any(), spec.name
        elif spec.name.endswith("k_proj.bias"):  # 0 but for rounding: it moves all scores of a query alike
            assert np.abs(gradient).max() < BOUNDS[dtype][1] * largest, spec.name
        else:
            assert relative(gradient, expected.numpy()) < BOUNDS[dtype][1], spec.name


@pytest.mark.parametrize("dtype", ["float64"])
def test_positions_masks_and_sizes(tmp_path, dtype):
    config = CONFIGS["stress"]
    ours, theirs = pair(tmp_path, "CLIPModel", config, dtype, "eager")
    positions = np.random.default_rng(5).integers(0, 13, (5, 11))
    inputs = {**text_inputs(config, 5), **image_inputs(config, 5, (17, 34)), "position_ids": positions}
    own, other = both(inputs, dtype)
    options = {"output_hidden_states": True, "interpolate_pos_encoding": True}
    assert_close(ours(**own, **options), theirs(**other, **options), dtype)
    other["position_ids"] = torch.from_numpy(positions[:1])
    found = ours.get_text_features(own["input_ids"], position_ids=positions[:1])
    expected = theirs.get_text_features(other["input_ids"], position_ids=other["position_ids"]).detach()
    assert relative(found, expected.numpy()) < BOUNDS[dtype][0]


def test_bfloat16_is_as_near_to_the_truth_as_pytorch(tmp_path):
    config = CONFIGS["plain"]
    inputs = inputs_of("CLIPModel", config)
    found = {}
    for dtype in ("bfloat16", "float64"):
        jax.config.update("jax_enable_x64", dtype == "float64")
        ours, theirs = pair(tmp_path, "CLIPModel", config, dtype, "eager")
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.no_grad():
            call = jax.jit(lambda params, ours=ours: ours(**inputs, params=params))
            found[dtype] = fields(call(ours.params)), fields(theirs(**tensors))
    for name, truth in found["float64"][1].items():
        error, allowed = (relative(output[name], truth) for output in found["bfloat16"])
        assert 0 < error < 2 * allowed, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64"])
def test_activations(name, dtype):
    x = np.linspace(-12, 12, 1001)
    assert relative(ACTIVATIONS[name](jnp.asarray(x)), TORCH_ACTIVATIONS[name](torch.from_numpy(x)).numpy()) < 1e-12
    assert ACTIVATIONS.keys() == TORCH_ACTIVATIONS.keys()


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 17])
@pytest.mark.parametrize("columns", [1, 5, 9])
@pytest.mark.parametrize("dtype", ["float64"])
def test_bicubic_kernel(rows, columns, dtype):
    positions = np.random.default_rng(0).normal(size=(26, 6))
    grid = torch.from_numpy(positions[1:]).reshape(1, 5, 5, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)[0].flatten(1).T.numpy()
    found = np.asarray(interpolate_positions(jnp.asarray(positions), rows, columns))
    assert np.array_equal(found[0], positions[0])
    assert relative(found[1:], expected) < 1e-12
    np.testing.assert_allclose(bicubic_weights(5, rows).sum(axis=1), 1, rtol=1e-12)
    if rows == 8:
        resized = jax.image.resize(jnp.asarray(positions[1:].reshape(5, 5, 6)), (rows, columns, 6), "bicubic")
        assert relative(resized.reshape(-1, 6), expected) > 1e-3  # another kernel, and another border


@pytest.mark.parametrize("dtype", ["float64"])
@pytest.mark.parametrize(
    ("labels", "count", "kind"),
    [
        (np.array([0, 6, 3, -100]), 7, None),
        (np.random.default_rng(1).random((4, 7)), 7, None),
        (np.array([0.5, 2, -1, 0]), 1, None),
        (np.random.default_rng(2).random((4, 7)), 7, "regression"),
        (np.eye(7, dtype=int)[:4], 7, "multi_label_classification"),
    ],
)
def test_classification_losses(labels, count, kind, dtype):
    config = CONFIGS["plain"]
    config = type(config).from_dict(config.to_dict(), num_labels=count, problem_type=kind)
    logits = 3 * np.random.default_rng(3).normal(size=(4, count))
    expected = torch_loss(torch.from_numpy(logits), torch.from_numpy(labels), config)
    assert relative(classification_loss(jnp.asarray(logits), labels, config), expected.numpy()) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the reference: names that JAX is about to remove
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("head", FORMER)
def test_the_former_models(tmp_path, head):
    """The reference differs where a query sees only padding, and by its LayerNorm's fast variance."""
    config = CONFIGS["plain"]
    folder = write_checkpoint(tmp_path / "file", config, head)
    ours = getattr(flax, "Flax" + head).from_pretrained(folder)
    ours.save_pretrained(tmp_path / "saved")
    theirs = getattr(transformers, "Flax" + head).from_pretrained(tmp_path / "saved")
    params = theirs.params
    assert jax.tree.structure(params) == jax.tree.structure(ours.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, ours.params))
    inputs = inputs_of(head, config)
    found, former = (
        fields(jax.jit(lambda params, model=model: model(**inputs, params=params, output_hidden_states=True))(params))
        for model in (ours, theirs)
    )
    assert found.keys() >= former.keys()
    for name, value in former.items():
        shown = np.ones(value.shape[:2], bool)
        if value.ndim == 3 and "Vision" not in head and "vision" not in name:
            shown[2, :3] = False  # the row that begins with padding
        pooled = name.endswith(("pooler_output", "text_embeds", "image_embeds"))
        assert relative(found[name][shown], value[shown]) < (2e-6 if pooled else 1e-5), name


def test_what_is_saved_loads_in_the_former_pytorch_models(tmp_path):
    config = CONFIGS["plain"]
    ours = flax.FlaxCLIPModel.from_pretrained(write_checkpoint(tmp_path / "file", config))
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "saved").state_dict()
    found = flatten_dict(ours.params)
    for spec in specs(config, "CLIPModel"):
        leaf = KINDS[spec.kind].to_canonical(np.asarray(found[spec.path("flax")]))
        assert np.array_equal(theirs[spec.name].numpy(), leaf), spec.name
