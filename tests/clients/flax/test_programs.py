"""Flax's TrainState, optax, orbax, jax.export and sharded training, around our Flax models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import CONFIGS, inputs_of, relative, write_checkpoint
from flax.training.train_state import TrainState
from jax import export
from processes import excerpt, python

from clipmb import FlaxCLIPModel

CONFIG = CONFIGS["plain"]
INPUTS = inputs_of("CLIPModel", CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "clip", CONFIG)


@pytest.fixture
def model(folder) -> FlaxCLIPModel:
    return FlaxCLIPModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def state(folder) -> TrainState:
    """A model's, after two steps."""
    model = FlaxCLIPModel.from_pretrained(folder)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(params):
            return state.apply_fn(**INPUTS, params=params, return_loss=True, train=True, dropout_rng=key).loss

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    key = jax.random.key(0)
    state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=optax.adamw(1e-3))
    return step(step(state))


def same(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_train_state_trains_and_its_params_are_saved(model, state, tmp_path):
    assert not same(state.params, model.params)
    model.save_pretrained(tmp_path / "trained", params=state.params)
    again = FlaxCLIPModel.from_pretrained(tmp_path / "trained")
    assert same(again.params, state.params)
    assert same(again(**INPUTS), model(**INPUTS, params=state.params))


def test_orbax_saves_and_restores_a_train_state(model, state, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        blank = TrainState.create(apply_fn=model.__call__, params=model.params, tx=state.tx)
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, blank))
    assert same(restored, state)
    model.params = restored.params
    assert same(model(**INPUTS), model(**INPUTS, params=state.params))


def test_an_exported_function_takes_any_batch(model):
    def features(params, input_ids, attention_mask, pixel_values):
        output = model(input_ids, pixel_values, attention_mask, params=params)
        return output.text_embeds, output.image_embeds

    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *value.shape[1:]), value.dtype) for value in ordered(INPUTS)]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    again = export.deserialize(export.export(jax.jit(features))(params, *shapes).serialize())
    for count in (1, 3):
        rows = [value[:count] for value in ordered(INPUTS)]
        for found, expected in zip(again.call(model.params, *rows), features(model.params, *rows), strict=True):
            assert found.shape == (count, CONFIG.projection_dim)
            assert relative(found, expected) < 1e-5


def ordered(inputs) -> list[np.ndarray]:
    """Ids, mask and pixels, with the integers that jax computes in."""
    return [np.asarray(jnp.asarray(inputs[name])) for name in ("input_ids", "attention_mask", "pixel_values")]


SHARDED = """
import sys; sys.path.insert(0, {tests!r})
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cases import CONFIGS, inputs_of, relative
from clipmb import FlaxCLIPModel

model, params = FlaxCLIPModel.from_pretrained({folder!r}, _do_init=False)
inputs, optimizer = inputs_of("CLIPModel", CONFIGS["plain"]), optax.sgd(1e-2)

def step(params, state, rows):
    loss, gradient = jax.value_and_grad(lambda params: model(**rows, params=params, return_loss=True).loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss

expected = jax.jit(step)(params, optimizer.init(params), inputs)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
place = lambda leaf: NamedSharding(mesh, P(None, "model") if leaf.ndim == 2 and leaf.shape[1] % 2 == 0 else P())
places, split, whole = jax.tree.map(place, params), NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
sharded = jax.jit(step, in_shardings=(places, None, split), out_shardings=(places, None, whole))
found = sharded(jax.device_put(params, places), optimizer.init(params), jax.device_put(inputs, split))
kernel = found[0]["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"]
assert kernel.addressable_shards[0].data.shape[1] * 2 == kernel.shape[1]
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert relative(a, b) < 1e-4
print(len(jax.devices()), "devices")
"""


def test_a_training_step_on_several_devices(folder, pytestconfig):
    code = SHARDED.format(tests=str(pytestconfig.rootpath / "tests"), folder=str(folder))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = python("-c", code, **flags)
    assert done.stdout.strip() == "4 devices", excerpt(done.stderr)
