"""SavedModels for serving: signatures that take any batch and any length of text."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Unpack

import tensorflow as tf
from tensorflow import Tensor

from clipmb.common.errors import bad_input
from clipmb.common.former import SavingOptions, check_saving
from clipmb.common.uploading import uploaded
from clipmb.tf.keras_model import KerasModel


class ExportMixin(KerasModel):
    """The exports of a model with one or both towers."""

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """The inputs of a served model: any batch, any length of text."""
        found: dict[str, tf.TensorSpec] = {}
        if hasattr(self, "text_model"):
            found["input_ids"] = tf.TensorSpec((None, None), tf.int32, "input_ids")
            found["attention_mask"] = tf.TensorSpec((None, None), tf.int32, "attention_mask")
        if hasattr(self, "vision_model"):
            config = self.vision_model.config
            shape = (None, config.num_channels, config.image_size, config.image_size)
            found["pixel_values"] = tf.TensorSpec(shape, tf.float32, "pixel_values")
        return found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        saved_model: bool = False,
        version: int = 1,
        *,
        signatures: Any = None,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **options: Unpack[SavingOptions],
    ) -> None:
        """Writes the files of `PretrainedMixin.save_pretrained`, and on request a SavedModel.

        Args:
            save_directory: The folder; made when it is missing.
            saved_model: Also call `export_saved_model`, for the folder ``saved_model/<version>``.
            version: The version of the SavedModel.
            signatures: Its signatures, instead of those of `export_saved_model`: one function or name to function.
            max_shard_size: As in `PretrainedMixin.save_pretrained`.
            variant: As in `PretrainedMixin.save_pretrained`.
            **options: The arguments of transformers 4's `save_pretrained`.

        Raises:
            ValueError: The model holds weights that its files have no place for, such as LoRA's, or there are
                signatures and no SavedModel to have them.
        """
        if signatures is not None and not saved_model:
            raise bad_input(
                "signatures apply to a SavedModel only", "saved_model=False", "Pass saved_model=True", shown=True
            )
        if check_saving(options):
            with uploaded(self, save_directory, options):
                self.save_arrays(self.to_arrays(), save_directory, max_shard_size=max_shard_size, variant=variant)
                if saved_model:
                    folder = os.path.join(save_directory, "saved_model", str(version))
                    self.export_saved_model(folder, signatures=signatures)

    def export_saved_model(self, folder: str | os.PathLike[str], *, signatures: Any = None) -> None:
        """Writes a SavedModel with signatures for serving and, for each tower, its features.

        ``serving_default`` takes `input_signature` and returns every tensor of the output that is not nested; models
        with a text tower also have ``int64_serving`` and, without attention_mask, ``serving_without_mask``.
        `TFCLIPModel` also has ``text_features`` and ``image_features``. Batch and length of text may be any. The
        endpoint ``serve``, which ``keras.layers.TFSMLayer`` calls, takes a dict of the inputs of any of these.

        Args:
            folder: Where; made when it is missing.
            signatures: Other signatures instead, as ``tf.saved_model.save`` takes them.
        """
        inputs = self.input_signature

        def serve(function: Callable[..., Any], *names: str) -> Any:
            signature = {name: inputs[name] for name in names}
            return tf.function(function, autograph=False).get_concrete_function(**signature)

        def default(**inputs: Tensor) -> dict[str, Tensor]:
            return {name: value for name, value in self(inputs, return_dict=True).items() if tf.is_tensor(value)}

        def features(name: str) -> Callable[..., dict[str, Tensor]]:
            return lambda **inputs: {name: getattr(self, f"get_{name}")(inputs)}

        serving = serve(default, *inputs)

        def converted(given: dict[str, Tensor]) -> dict[str, Tensor]:  # to what the one graph takes
            if "input_ids" in given:
                mask = given.get("attention_mask")
                ones = tf.ones_like(given["input_ids"], tf.int32)
                given = {**given, "attention_mask": ones if mask is None else mask}
            return serving(**{name: tf.cast(value, inputs[name].dtype) for name, value in given.items()})

        endpoint = tf.function(converted, autograph=False)
        endpoint.get_concrete_function(inputs)
        own = {"serving_default": serving}
        if "input_ids" in inputs:
            wide = {
                name: tf.TensorSpec(spec.shape, tf.int64, name) if spec.dtype == tf.int32 else spec
                for name, spec in inputs.items()
            }
            for name, specs in {"serving_without_mask": inputs, "int64_serving": wide}.items():
                unmasked = {field: spec for field, spec in specs.items() if field != "attention_mask"}
                bare, full = endpoint.get_concrete_function(unmasked), endpoint.get_concrete_function(specs)
                own[name] = bare if name == "serving_without_mask" else full
        if hasattr(self, "get_text_features"):
            own["text_features"] = serve(features("text_features"), "input_ids", "attention_mask")
            own["image_features"] = serve(features("image_features"), "pixel_values")
        module: Any = tf.Module()
        module.serve = endpoint
        module.weights = [variable.value for variable in self.variables]
        tf.saved_model.save(module, os.fspath(folder), signatures=own if signatures is None else signatures)

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keras' export, with the signatures of `export_saved_model` where none are given."""
        if format == "tf_saved_model" and input_signature is None:
            self.export_saved_model(filepath)
        else:
            super().export(filepath, format, verbose, input_signature, **kwargs)
