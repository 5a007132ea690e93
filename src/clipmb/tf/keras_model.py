"""What Keras asks of a model and the other frameworks do not: calls, configs of its files, losses of ``fit``."""

from __future__ import annotations

from typing import Any, Self

import keras
import tensorflow as tf
from tensorflow import Tensor

from clipmb.common.parameters import Spec, specs
from clipmb.common.pretrained import PretrainedMixin
from clipmb.tf.layers import build_parts
from clipmb.tf.tensors import bind, distribution, initializer


class KerasModel(PretrainedMixin, keras.Model):
    """A Keras model that takes its inputs as `clipmb.tf.tensors.bind` does, and brings its own loss."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model on inputs by name, by position, or in one mapping: tensors, arrays or lists.

        Raises:
            TypeError: A name is unknown or given twice.
            ValueError: A shape or a value does not fit.
        """
        return super().__call__(**bind(type(self).call, type(self).__name__, args, kwargs))

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

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` rebuilds the model from, for ``.keras`` files."""
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return {"config": self.config.to_dict(), "dtype": policy, "name": self.name, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Builds a model from the result of `get_config`."""
        own = cls.config_class.from_dict(config["config"])
        dtype = keras.dtype_policies.deserialize(config["dtype"])
        return cls(config=own, dtype=dtype, name=config["name"], trainable=config["trainable"])

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
