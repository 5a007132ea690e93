"""Every PyTorch head against transformers 4.57.6: all outputs and all gradients, float32 and float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases import ALL_HEADS, CONFIGS, config_of, inputs_of, relative, write_checkpoint

from clipmb import pt
from clipmb.common.config import ACTIVATIONS
from clipmb.common.parameters import specs
from clipmb.pt.layers import ACTIVATIONS as FUNCTIONS

# The reference's softmax is in float32 even when it computes in float64, except in fused attention.
BOUNDS = {"float32": 1e-6, "float64": 1e-12}


def pair(tmp_path, head, config, dtype, implementation):
    folder = write_checkpoint(tmp_path / head, config, head)
    theirs = getattr(transformers, head).from_pretrained(folder, attn_implementation=implementation, dtype=dtype)
    ours = getattr(pt, head).from_pretrained(folder, attn_implementation=implementation, dtype=dtype)
    return ours, theirs


def inputs_for(head, config, dtype, batch=5):
    inputs = {name: torch.from_numpy(value) for name, value in inputs_of(head, config, batch).items()}
    return {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value for name, value in inputs.items()
    }


def fields(output, prefix=""):
    """Every tensor of an output by its path."""
    found = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif isinstance(value, tuple):
            found.update({f"{prefix}{name}.{i}": part for i, part in enumerate(value)})
        else:
            found.update(fields(value, f"{prefix}{name}."))
    return found


@pytest.fixture
def default_dtype():
    """The reference's text tower works in float64 only when that is torch's default."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize(("dtype", "implementation"), [("float32", "eager"), ("float32", "sdpa"), ("float64", "sdpa")])
def test_outputs_and_gradients(tmp_path, default_dtype, case, head, dtype, implementation):
    config = CONFIGS[case]
    ours, theirs = pair(tmp_path, head, config, dtype, implementation)
    inputs = inputs_for(head, config, dtype)
    options = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    if head == "CLIPModel":
        options["return_loss"] = True
    if head == "CLIPForImageClassification":
        options["labels"] = torch.tensor([0, 6, 3, 1, 2])
    default_dtype(getattr(torch, dtype))
    expected, found = fields(theirs(**inputs, **options)), fields(ours(**inputs, **options))
    assert found.keys() == expected.keys()
    assert len(found) > 4
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert relative(found[name].detach(), value.detach()) <= BOUNDS[dtype], name

    def gradients(model, output):
        torch.manual_seed(0)
        # A random direction in every output, so that no gradient cancels.
        total = sum(
            (value * torch.randn(value.shape, dtype=value.dtype)).sum() for name, value in sorted(output.items())
        )
        model.zero_grad()
        total.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(theirs, fields(theirs(**inputs, **options)))
    found = gradients(ours, fields(ours(**inputs, **options)))
    names = {spec.name for spec in specs(config_of(head, config), head)}
    assert found.keys() == expected.keys() == names
    for name, value in expected.items():
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")]  # the gradient of a key's bias is 0 but for noise
        if value is None:
            assert found[name] is None
            continue
        assert found[name] is not None, name
        distance = (found[name] - value).abs().max() / scale.abs().max()
        assert distance <= {"float32": 1e-5, "float64": 1e-12}[dtype], name


@pytest.mark.parametrize("case", CONFIGS)
def test_eager_attention_in_float32_is_bit_equal(tmp_path, case):
    ours, theirs = pair(tmp_path, "CLIPModel", CONFIGS[case], "float32", "eager")
    inputs = inputs_for("CLIPModel", CONFIGS[case], "float32")
    options = {"output_hidden_states": True, "output_attentions": True, "return_loss": True}
    expected, found = fields(theirs(**inputs, **options)), fields(ours(**inputs, **options))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [(20, 20), (28, 20), (13, 38), (64, 4), (24, 24)])
def test_interpolated_positions(tmp_path, implementation, size):
    ours, theirs = pair(tmp_path, "CLIPVisionModelWithProjection", CONFIGS["stress"], "float32", implementation)
    pixels = torch.randn(2, 3, *size)
    options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
    expected, found = fields(theirs(pixels, **options)), fields(ours(pixels, **options))
    for name, value in expected.items():
        assert relative(found[name].detach(), value.detach()) <= 1e-6, name


def test_position_ids_and_missing_masks(tmp_path):
    ours, theirs = pair(tmp_path, "CLIPTextModel", CONFIGS["stress"], "float32", "eager")
    ids = inputs_for("CLIPTextModel", CONFIGS["stress"], "float32")["input_ids"]
    for positions in (torch.arange(11).flip(0)[None], torch.randint(0, 13, ids.shape)):
        assert torch.equal(ours(ids, None, positions)[0], theirs(ids, None, positions)[0])


def test_features(tmp_path):
    ours, theirs = pair(tmp_path, "CLIPModel", CONFIGS["stress"], "float32", "eager")
    inputs = inputs_for("CLIPModel", CONFIGS["stress"], "float32")
    pixels = inputs.pop("pixel_values")
    assert torch.equal(ours.get_text_features(**inputs), theirs.get_text_features(**inputs))
    assert torch.equal(ours.get_image_features(pixels), theirs.get_image_features(pixels))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_bit_equal(tmp_path, dtype):
    ours, theirs = pair(tmp_path, "CLIPModel", CONFIGS["plain"], dtype, "eager")
    inputs = inputs_for("CLIPModel", CONFIGS["plain"], dtype)
    expected, found = fields(theirs(**inputs)), fields(ours(**inputs))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    assert relative(FUNCTIONS[name](x), ACT2FN[name](x)) <= 1e-12


def test_initial_spread(tmp_path):
    """The spread of every parameter at construction, pooled over blocks."""
    text = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 999, "initializer_factor": 2.0}
    vision = {"hidden_size": 96, "num_hidden_layers": 3, "initializer_range": 0.3}
    config = pt.modeling.CLIPConfig(text, vision, projection_dim=64)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config.to_dict()))
    ours = pt.CLIPModel(config)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.1), name
        elif parameter.ndim < 2 and not name.endswith("class_embedding"):
            assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_files_go_both_ways(tmp_path, head, size):
    ours, theirs = pair(tmp_path, head, CONFIGS["stress"], "float32", "eager")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=size)
    again = getattr(pt, head).from_pretrained(tmp_path / "theirs")
    there, info = getattr(transformers, head).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    names = {spec.name for spec in specs(ours.config, head)}
    for state in (again.state_dict(), there.state_dict()):
        assert state.keys() == names
        assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    assert again.config.to_dict().keys() >= ours.config.to_dict().keys() - {"architectures"}
