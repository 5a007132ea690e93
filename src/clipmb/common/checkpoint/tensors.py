"""Arrays that are made when they are asked for, so that a checkpoint is never in memory as one."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from clipmb.common.config import BaseConfig
from clipmb.common.parameters import HEADS, Spec
from clipmb.common.workers import default_workers

_CACHED = 1 << 16  # values that a processor's cache holds
_MANY = 1 << 25  # bytes for which threads are worth their start


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Lazy:
    """An array that is yet to be made, and what is known of it before.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        make: Makes it. Each call makes it again, where it is not a view of something.
        release: Takes the pages of a mapped file that it was made from out of memory; they are read again when they
            are needed. Only for whoever owns the mapping: what was written to such an array is lost.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    release: Callable[[], None] = _nothing

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    def stand_in(self) -> np.ndarray:
        """Returns an array of this shape and dtype that takes no memory: one zero, seen everywhere."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)

    def viewed(self, view: Callable[[np.ndarray], np.ndarray]) -> Lazy:
        """Returns the array as a view shows it: transposed, or of another shape."""
        seen = view(self.stand_in())
        return Lazy(seen.shape, seen.dtype, lambda: view(self.make()), self.release)

    def astype(self, dtype: np.dtype) -> Lazy:
        """Returns the array rounded to a dtype; values too large for it become infinite."""
        return (
            self if dtype == self.dtype else Lazy(self.shape, dtype, lambda: rounded(self.make(), dtype), self.release)
        )


class Deferred(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is asked for and not kept: asking twice makes it twice."""

    def __init__(self, lazy: Mapping[str, Lazy]) -> None:
        self.lazy = lazy

    def __getitem__(self, name: str) -> np.ndarray:
        return self.lazy[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazy)

    def __len__(self) -> int:
        return len(self.lazy)

    def __contains__(self, name: object) -> bool:
        return name in self.lazy  # without making the array


def lazy(arrays: Mapping[str, np.ndarray], *, own: bool = False) -> Mapping[str, Lazy]:
    """Returns the arrays of a mapping as lazy ones, without making any.

    Args:
        arrays: `Deferred`, or a mapping of arrays that exist.
        own: Nobody else uses the arrays, so that the pages of mapped ones may be released.
    """
    if isinstance(arrays, Deferred):
        return arrays.lazy
    return {name: _existing(array, own) for name, array in arrays.items()}


def _existing(array: np.ndarray, own: bool) -> Lazy:
    return Lazy(array.shape, array.dtype, lambda: array, partial(release_pages, array) if own else _nothing)


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns an array in a dtype; values too large for it become infinite."""
    with np.errstate(over="ignore"):
        return array if array.dtype == dtype else array.astype(dtype)


def is_finite(array: np.ndarray, dtype: str | None = None) -> bool:
    """Whether an array has neither NaN nor infinity, at the speed at which memory is read, and without a copy.

    Args:
        array: Floating-point values.
        dtype: What they will be rounded to: in float16, numbers above 65,504 become infinite.
    """
    array = array.ravel(order="K")
    limit = 65_520 if dtype == "float16" and array.dtype != np.float16 else np.inf
    size = array.itemsize
    signed, unsigned = array.view(f"i{size}"), array.view(f"u{size}")  # whose order is that of the values' magnitude
    high = np.full(1, limit, array.dtype).view(signed.dtype)[0]
    low = np.full(1, -limit, array.dtype).view(unsigned.dtype)[0]
    for start in range(0, len(array), _CACHED):  # both looks at a part while it is near
        part = slice(start, start + _CACHED)
        if signed[part].max() >= high or unsigned[part].max() >= low:
            return False
    return True


def not_finite(arrays: Mapping[str, np.ndarray], dtype: str | None = None) -> list[str]:
    """Returns the names of the arrays that are not finite, as `is_finite` says; several threads look at large ones."""

    def check(name: str) -> bool:
        return is_finite(arrays[name], dtype)

    if sum(array.nbytes for array in arrays.values()) < _MANY:
        return [name for name in arrays if not check(name)]
    with ThreadPoolExecutor(default_workers(), thread_name_prefix="clipmb-finite") as pool:
        return [name for name, good in zip(arrays, pool.map(check, arrays), strict=True) if not good]


# -- mapped files -----------------------------------------------------------------------------------------------------


def mapped(content: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Lazy:
    """Returns an array that lies in a mapped file as it is: a view, where its alignment and byte order allow one.

    Args:
        content: The file.
        dtype: The dtype in the file; the array has it in the machine's byte order.
        shape: The shape.
        offset: The array's first byte.
    """
    count = math.prod(shape)

    def make() -> np.ndarray:
        if not count:
            return np.empty(shape, native)
        array = np.frombuffer(content, dtype, count, offset).reshape(shape)
        if not dtype.isnative:
            return array.astype(native)
        return array if array.flags.aligned else array.copy()

    native = dtype if dtype.isnative else dtype.newbyteorder("=")
    return Lazy(shape, native, make, partial(_release, content, offset, count * dtype.itemsize))


def release_pages(array: np.ndarray) -> None:
    """Takes the pages of an array out of memory, if it is a view of a mapped file; see `Lazy.release`."""
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and array.flags.c_contiguous:
        _release(base, array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data, array.nbytes)


def _release(content: mmap.mmap, start: int, length: int) -> None:
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with a neighbour stay
    if (length := (start + length - first) // mmap.PAGESIZE * mmap.PAGESIZE) > 0 and hasattr(content, "madvise"):
        content.madvise(mmap.MADV_DONTNEED, first, length)


class OwnArrays(dict[str, np.ndarray]):
    """Arrays of mapped files to which nobody else has a reference, so that their memory can be given back early."""

    def release(self, name: str) -> None:
        """Takes the pages of an array out of memory; they are read from the file again when they are needed.

        Without this, a framework that copies would hold the weights twice at the end of loading.
        """
        release_pages(self[name])


# -- what a format reads ----------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """The weights of a source.

    Attributes:
        format: Key of `formats.FORMATS`.
        tensors: Name to array: canonical names in any of the dialects that `fit` takes. Values may be made when they
            are asked for, so that a file is never in memory as one; asking twice may read twice.
        files: Names of the files that hold them, relative to the source.
        config: The config, where the format carries one of its own or it was inferred from shapes; else None, and
            ``config.json`` is the config.
        decisions: What was inferred, and why, for the record of a conversion.
        packages: The packages that took part in reading, beside numpy and ml_dtypes.
        names: As `formats.Format.names`, where the files have other names than those that the format writes.
        undescribed: Why there is neither a config nor a way to infer one, for whoever needs one.
        others: Further models of the same file, such as the second text encoder of SDXL.
    """

    format: str
    tensors: Mapping[str, np.ndarray]
    files: list[str]
    config: BaseConfig | None = None
    decisions: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    names: Callable[[list[Spec]], dict[str, str]] | None = None
    undescribed: str = ""
    others: list[Loaded] = field(default_factory=list)

    def of(self, head: str) -> Loaded:
        """Returns the first model of the file that has all that a head has beside its towers, else the first one."""
        needed = HEADS[head][2]
        return next((one for one in (self, *self.others) if all(name in one.tensors for name in needed)), self)
