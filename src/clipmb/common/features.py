"""What tokenizer and image processor return: a dict of arrays in the framework that was asked for."""

from __future__ import annotations

import importlib
from collections import UserDict
from typing import Any, Self

import numpy as np

from clipmb.common.errors import MissingBackendError, bad_input, one_of

TENSOR_TYPES = ("np", "pt", "tf", "jax")
_MAKERS = {  # module and function, and the extra that installs them
    "pt": ("torch", "from_numpy", "pt"),
    "tf": ("tensorflow", "convert_to_tensor", "tf"),
    "jax": ("jax.numpy", "asarray", "flax"),
}
_INTEGERS = {"np": np.int64, "pt": np.int64, "tf": np.int32, "jax": np.int32}  # as transformers 4


def check_tensor_type(return_tensors: Any) -> str | None:
    """Returns ``return_tensors`` as one of TENSOR_TYPES or None.

    Raises:
        ValueError: It is something else.
    """
    name = getattr(return_tensors, "value", return_tensors)  # the enum of transformers 4 has string values
    if name is not None and name not in TENSOR_TYPES:
        raise one_of("return_tensors", return_tensors, (*TENSOR_TYPES, None))
    return name


def to_tensor(array: np.ndarray, return_tensors: str) -> Any:
    """Turns a numpy array into a tensor of the framework; integers become the framework's usual index type.

    Raises:
        MissingBackendError: The framework is not installed.
    """
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        array = array.astype(_INTEGERS[return_tensors], copy=False)
    if return_tensors == "np":
        return array
    module, function, extra = _MAKERS[return_tensors]
    try:
        maker = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise MissingBackendError(extra, module, cause=str(error)) from error
    return maker(np.ascontiguousarray(array).reshape(array.shape))


def to_numpy(value: Any) -> np.ndarray:
    """Turns an array or tensor of any framework into numpy, without importing the framework."""
    if hasattr(value, "detach"):  # torch: leave the graph and the device
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which numpy lacks
            value = value.float()
    return np.asarray(value)


class BatchFeature(UserDict):
    """A dict of arrays whose entries are attributes too.

    Args:
        data: Field name to array, or to a list of arrays.
        tensor_type: "np", "pt", "tf", "jax", or None to leave the values as they are.
    """

    def __init__(self, data: dict[str, Any] | None = None, tensor_type: str | None = None) -> None:
        super().__init__(data or {})
        self.convert_to_tensors(tensor_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "data":
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {list(self.data)}") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.data[key]
        raise bad_input(
            f"{type(self).__name__} is indexed by a field name", key, f"Use one of {list(self.data)}", KeyError
        )

    def convert_to_tensors(self, tensor_type: str | None = None) -> Self:
        """Converts every entry in place.

        Raises:
            ValueError: The rows of an entry differ in size, so that they make no rectangular array.
        """
        tensor_type = check_tensor_type(tensor_type)
        if tensor_type is None:
            return self
        for name, value in self.data.items():
            if isinstance(value, list | tuple):
                try:
                    value = np.stack([to_numpy(row) for row in value]) if len(value) else np.asarray(value)
                except ValueError:
                    sizes = sorted({np.shape(row) for row in value if not isinstance(row, list) or np.shape(row)})
                    raise bad_input(
                        f"The rows of {name} must have one size to become a tensor",
                        f"sizes {sizes[:5]}",
                        "Ask for padding=True and truncation=True, or for equal image sizes",
                        shown=True,
                    ) from None
            self.data[name] = to_tensor(to_numpy(value), tensor_type)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves torch tensors to a device, and the floating ones to a dtype, as ``torch.Tensor.to`` does."""
        wants_dtype = "dtype" in kwargs or any("dtype" in type(arg).__name__ for arg in args)
        device_only = [arg for arg in args if "dtype" not in type(arg).__name__]
        for name, value in self.data.items():
            if not hasattr(value, "is_floating_point"):
                continue
            if wants_dtype and not value.is_floating_point():
                rest = {key: kwargs[key] for key in kwargs if key != "dtype"}
                self.data[name] = value.to(*device_only, **rest) if device_only or rest else value
            else:
                self.data[name] = value.to(*args, **kwargs)
        return self
