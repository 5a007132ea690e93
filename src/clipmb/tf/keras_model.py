"""What Keras asks of a model and the other frameworks do not: calls, configs of its files, losses of ``fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from clipmb.common import checks
from clipmb.common.checkpoint.tensors import Deferred
from clipmb.common.config import BaseConfig
from clipmb.common.errors import bad_input
from clipmb.common.parameters import Spec, specs
from clipmb.common.pretrained import PretrainedMixin, dummy_arrays
from clipmb.tf.layers import build_parts
from clipmb.tf.tensors import bind, distribution, given, initializer, lazy_numpy, to_tensor


class Compiled:
    """What Keras' compiled functions are frozen to: a plain object, whose content Keras does not take for weights.

    Attributes:
        states: Name of a function to the state it was made in, and the variables, whose ids no others may take.
    """

    def __init__(self) -> None:
        self.states: dict[str, tuple[Any, Any]] = {}


def optimizer_for(optimizer: Any, variables: list[keras.Variable]) -> keras.optimizers.Optimizer:
    """Returns an optimizer that knows all variables: itself, or one like it that goes on from what it knew.

    Args:
        optimizer: One of Keras that is built.
        variables: What is to be trained. One in the place of another, by its path, takes over the rows of its moments.
    """
    known = {id(variable) for variable in optimizer._trainable_variables}
    if all(id(variable) in known for variable in variables):
        return optimizer
    new = type(optimizer).from_config(optimizer.get_config())
    new.build(variables)
    old = {variable.path: variable.numpy() for variable in optimizer.variables}
    for variable in new.variables:
        if variable.path in old and variable.shape[1:] == old[variable.path].shape[1:]:
            value, before = np.array(variable.numpy()), old[variable.path]
            kept = slice(min(len(value), len(before))) if value.ndim else ()
            value[kept] = before[kept]
            variable.assign(value)
    return new


class KerasModel(PretrainedMixin, keras.Model):
    """A Keras model that takes its inputs as `clipmb.tf.tensors.bind` does, and brings its own loss."""

    framework = "tf"
    load_options: ClassVar[tuple[str, ...]] = ("dtype_policy",)

    def __init__(self, config: BaseConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(dtype=dtype, **kwargs)
        self._compiled = Compiled()
        self.config: Any = checks.config_of(type(self).__name__, self.config_class, config)

    if not TYPE_CHECKING:  # its types are those of the method that it extends

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *, dtype: Any = None, **options: Any) -> Any:
            """Loads a model; arguments as in `PretrainedMixin.from_pretrained`, and ``dtype`` may be a Keras policy."""
            if isinstance(dtype, keras.DTypePolicy) or (isinstance(dtype, str) and dtype.startswith("mixed_")):
                options["dtype_policy"], dtype = dtype, None
            return super().from_pretrained(pretrained_model_name_or_path, dtype=dtype, **options)

    @classmethod
    def from_arrays(
        cls,
        config: Any,
        arrays: dict[str, np.ndarray],
        initialised: list[Spec],
        dtype: str | None,
        dtype_policy: Any = None,
    ) -> Self:
        """Builds the model around canonical arrays, and draws the parameters that have none.

        Args:
            config: As in `PretrainedMixin.from_arrays`.
            arrays: As in `PretrainedMixin.from_arrays`.
            initialised: As in `PretrainedMixin.from_arrays`.
            dtype: As in `PretrainedMixin.from_arrays`.
            dtype_policy: A Keras dtype policy instead of ``dtype``.
        """
        with given(arrays):
            return cls(config, dtype=dtype if dtype_policy is None else dtype_policy)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model on inputs by name, by position, or in one mapping: tensors, arrays or lists.

        Raises:
            TypeError: A name is unknown or given twice.
            ValueError: A shape or a value does not fit.
        """
        return super().__call__(**bind(type(self).call, type(self).__name__, args, kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a layer takes the place of the one before it, which Keras would keep among the weights."""
        old = self.__dict__.get(name)
        if isinstance(value, keras.layers.Layer) and isinstance(old, keras.layers.Layer) and value is not old:
            if self._tracker.is_in_store("layers", value):
                self._tracker.untrack(old)
            else:
                self._tracker.replace_tracked_value("layers", old, value)
        super().__setattr__(name, value)

    def build(self, input_shape: Any = None) -> None:
        """Creates the weights of every part."""
        build_parts(self)

    def _owner(self, spec: Spec) -> keras.layers.Layer:
        owner: Any = self
        for part in spec.path("tf")[:-1]:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        return owner

    def parameter(self, spec: Spec) -> keras.Variable:
        """Returns the variable of a parameter."""
        return getattr(self._owner(spec), spec.path("tf")[-1])

    def post_init(self) -> None:
        """Creates every weight, from its array within `clipmb.tf.tensors.given`, else from its distribution."""
        table = [
            (self._owner(spec), f"{spec.path('tf')[-1]}_initializer", spec) for spec in specs(self.config, self.head)
        ]
        for owner, name, spec in table:
            setattr(owner, name, initializer(spec))
        self.build()
        for owner, name, spec in table:
            setattr(owner, name, distribution(spec))  # which lets go of the array
        self._tracker.unlock()  # subclasses may add layers

    @classmethod
    def canonical_array(cls, value: Any) -> np.ndarray:
        """Returns one value of a ``state_dict`` as numpy."""
        return value.numpy() if tf.is_tensor(value) or isinstance(value, keras.Variable) else np.asarray(value)

    def to_arrays(self) -> Deferred:
        """Returns every parameter by its canonical name, in canonical layout, each made when it is asked for.

        Raises:
            ValueError: The model holds other weights, too, which would be lost, or has a layer without its own.
        """
        table: dict[Spec, Any] = {}
        for spec in specs(self.config, self.head):
            try:
                table[spec] = self.parameter(spec)
            except AttributeError:  # a layer of another kind in the place of ours, or one that is not built
                table[spec] = None
        known = {id(parameter) for parameter in table.values()}
        if others := [weight.path for weight in self.weights if id(weight) not in known]:
            raise bad_input(
                "A checkpoint holds the weights of CLIP alone",
                f"{len(others)} others: {', '.join(others[:5])}",
                "Remove what was added to the model, or save it with model.save_weights",
                shown=True,
            )
        if lost := [spec.name for spec, parameter in table.items() if parameter is None]:
            raise bad_input(
                "A checkpoint holds all weights of CLIP",
                f"a model without {', '.join(lost[:5])}",
                "Build the layers that were put into the model, or save it with model.save_weights",
                shown=True,
            )
        return Deferred({spec.name: lazy_numpy(parameter, spec) for spec, parameter in table.items()})

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Inputs that fit the model: ids (3, 5) of int32, and images (3, channels, size, size)."""
        return {name: to_tensor(array) for name, array in dummy_arrays(self.config, self.head, np.int32).items()}

    def init_weights(self) -> None:
        """Draws every parameter from its initial normal distribution."""
        for spec in specs(self.config, self.head):
            parameter = self.parameter(spec)
            parameter.assign(distribution(spec)(parameter.shape, dtype=parameter.dtype))

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` rebuilds the model from, for ``.keras`` files."""
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return {"config": self.config.to_dict(), "dtype": policy, "name": self.name, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: dict[str, Any] | BaseConfig, custom_objects: Any = None, **kwargs: Any) -> Self:
        """Builds a model from the result of `get_config`, as Keras does, or from a config, as transformers 4 does."""
        if not isinstance(config, dict):
            return cls(config=config, **kwargs)
        own = cls.config_class.from_dict(config["config"])
        dtype = keras.dtype_policies.deserialize(config["dtype"])
        return cls(config=own, dtype=dtype, name=config["name"], trainable=config["trainable"])

    def _changed(self, function: str) -> bool:
        """Returns whether weights, what is trained, attention or checkpointing differ from when it was last called."""
        encoders = [layer for layer in self._flatten_layers() if hasattr(layer, "checkpointing")]
        state = (
            [id(variable) for variable in self.variables],
            [id(variable) for variable in self.trainable_variables],
            [(encoder.config.attn_implementation, encoder.checkpointing) for encoder in encoders],
        )
        before, _ = self._compiled.states.get(function, (state, None))
        self._compiled.states[function] = state, self.variables
        return before != state

    def make_train_function(self, force: bool = False) -> Any:
        """Makes what ``fit`` calls, again if the model has changed; the optimizer keeps what it knows of weights."""
        changed = self._changed("train")
        if self.optimizer is not None and self.optimizer.built:
            self.optimizer = optimizer_for(self.optimizer, self.trainable_variables)
        return super().make_train_function(force or changed)

    def make_test_function(self, force: bool = False) -> Any:
        """Makes what ``evaluate`` calls, again if the model has changed."""
        changed = self._changed("test")
        return super().make_test_function(force or changed)

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes what ``predict`` calls, again if the model has changed."""
        changed = self._changed("predict")
        return super().make_predict_function(force or changed)

    def own_loss(self, y: Any, y_pred: Any) -> Tensor | None:
        """Returns the loss to train with where ``compile`` was given none.

        Args:
            y: Labels beside the inputs; None without.
            y_pred: The output of the model.

        Returns:
            (), or None for a model that has none.
        """
        return None

    def scored(self, y_pred: Any) -> Any:
        """Returns the part of an output that the loss and the metrics of ``compile`` are given."""
        return y_pred

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Returns the loss of ``compile``, or `own_loss` where it was given none."""
        if self._compile_loss is not None:
            return super().compute_loss(x, y, self.scored(y_pred), sample_weight, training)
        own = self.own_loss(y, y_pred)
        if own is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)  # which raises that there is none
        return tf.add_n([own, *(tf.cast(loss, own.dtype) for loss in self.losses)])

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Returns the metrics of ``compile``, for labels beside the inputs or among them."""
        if y is None and isinstance(x, dict):
            y = x.get("labels")
        return super().compute_metrics(x, y, self.scored(y_pred), sample_weight)
