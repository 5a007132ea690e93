"""AdamW in TensorFlow, as ``torch.optim.AdamW`` defines it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import tensorflow as tf
from tensorflow import Tensor

from clipmb.common.training.recipe import Recipe


class AdamW:
    """AdamW over parameters of one dtype, whose moments lie beside them on every device.

    TensorFlow's kernel for Adam adds epsilon to the root of the uncorrected second moment, and Keras' AdamW does so
    too; PyTorch adds it to the root of the corrected one. With epsilon multiplied by the correction they are the same.

    Source: arXiv 1711.05101, algorithm 2, in the form of ``torch.optim.AdamW``.

    Args:
        recipe: Holds betas, epsilon and decay.
        parameters: Canonical name to variable. Call the constructor within their ``tf.distribute`` scope.
        decaying: The names of those that decay.

    Attributes:
        first: Canonical name to first moment, shaped as the parameter.
        second: The second moments likewise.
    """

    def __init__(self, recipe: Recipe, parameters: Mapping[str, tf.Variable], decaying: Collection[str]) -> None:
        self.recipe, self.parameters, self.decaying = recipe, dict(parameters), frozenset(decaying)
        self.first = {name: tf.Variable(tf.zeros_like(of), trainable=False) for name, of in parameters.items()}
        self.second = {name: tf.Variable(tf.zeros_like(of), trainable=False) for name, of in parameters.items()}

    def apply(self, gradients: Mapping[str, Tensor], rate: Tensor, step: Tensor) -> None:
        """Takes a step. Every device must call it, with the same arguments.

        Args:
            gradients: Name to gradient, already summed over the devices.
            rate: () float64, the learning rate.
            step: () float64, the number of this step, from 1.
        """
        # In float64 whatever the parameters are: 1 - beta^step loses digits.
        power1, power2 = (tf.pow(tf.constant(beta, tf.float64), step) for beta in self.recipe.betas)
        root = tf.sqrt(1 - power2)
        numbers = rate * self.recipe.weight_decay, rate * root / (1 - power1), self.recipe.eps * root
        tf.distribute.get_replica_context().merge_call(self._apply, (dict(gradients), *numbers))

    def _apply(self, strategy: tf.distribute.Strategy, gradients: dict[str, Tensor], *numbers: Tensor) -> None:
        for name, parameter in self.parameters.items():
            arguments = (self.first[name], self.second[name], gradients[name], name in self.decaying, *numbers)
            strategy.extended.update(parameter, self._update, arguments, group=False)

    def _update(
        self,
        parameter: tf.Variable,
        first: tf.Variable,
        second: tf.Variable,
        gradient: Tensor,
        decays: bool,
        *numbers: Tensor,
    ) -> None:
        """Updates one parameter on one device, and its moments."""
        decay, rate, epsilon = (tf.cast(number, parameter.dtype) for number in numbers)
        if decays:
            parameter.assign_sub(decay * parameter)
        beta1, beta2 = self.recipe.betas
        tf.raw_ops.ResourceApplyAdam(  # powers of 0, since the rate is corrected already
            var=parameter.handle, m=first.handle, v=second.handle, grad=gradient, lr=rate, epsilon=epsilon,
            beta1=tf.constant(beta1, parameter.dtype), beta2=tf.constant(beta2, parameter.dtype),
            beta1_power=tf.zeros((), parameter.dtype), beta2_power=tf.zeros((), parameter.dtype),
        )  # fmt: skip
