"""CLIP's image preprocessing: resize, centre crop, rescale, normalise; bit for bit what the former library computes.

Rescaling and normalising an 8-bit image is a function of 256 values per channel. It is computed once into a table, with
the reference's operations in the reference's order, and looked up for every pixel; what remains is Pillow's resize.

Source: the arithmetic follows ``CLIPImageProcessor`` of transformers 4.57.6, against which tests/reference holds it.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from clipmb.common.errors import bad_input, log_once, logger, one_of, whole_number
from clipmb.common.features import BatchFeature, check_tensor_type
from clipmb.common.former import check_saving
from clipmb.common.hub import Source
from clipmb.common.image import pixels as px
from clipmb.common.json_files import json_text, read_json
from clipmb.common.saving import Transaction, write_atomically
from clipmb.common.workers import default_workers

OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"


_SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
)


class CLIPImageProcessor:
    """Turns pictures into the ``pixel_values`` of a CLIP model.

    Args:
        do_resize: Resize to ``size``.
        size: ``{"shortest_edge": pixels}`` keeps the aspect ratio, ``{"height": pixels, "width": pixels}`` does not.
            An int is a shortest edge, a pair is (height, width). Default ``{"shortest_edge": 224}``.
        resample: Pillow's resampling filter, 0 to 5; 3 is bicubic.
        do_center_crop: Cut, or pad with zeros, to ``crop_size`` around the centre.
        crop_size: ``{"height": pixels, "width": pixels}``; an int is a square. Default 224 by 224.
        do_rescale: Multiply by ``rescale_factor``.
        rescale_factor: Default 1/255, which brings 8-bit values into [0, 1].
        do_normalize: Subtract ``image_mean`` and divide by ``image_std``.
        image_mean: One number, or one per channel. Default: CLIP's.
        image_std: One number, or one per channel. Default: CLIP's.
        do_convert_rgb: Convert Pillow images to RGB. Arrays are never converted.
        **kwargs: Kept as attributes and written back by `save_pretrained`, so that unknown entries of a file survive.

    Raises:
        ValueError: A size has keys, a length or values that mean nothing.
    """

    model_input_names: list[str] = ["pixel_values"]  # noqa: RUF012 - the former library's public attribute
    is_fast = False

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | tuple[int, int] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int | tuple[int, int] | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("feature_extractor_type", None)  # in files older than image processors
        kwargs.pop("image_processor_type", None)  # always this class when written
        named = kwargs.pop("_processor_class", None)
        self._processor_class: str | None = kwargs.pop("processor_class", None) or named
        square = kwargs.pop("use_square_size", False)  # in KOSMOS-2's files
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.do_resize = do_resize
        self.size = _size_dict("size", {"shortest_edge": 224} if size is None else size, square=False)
        if square and "shortest_edge" in self.size:
            self.size = {"height": self.size["shortest_edge"], "width": self.size["shortest_edge"]}
        self.resample = resample
        self.do_center_crop = do_center_crop
        self.crop_size = _size_dict("crop_size", 224 if crop_size is None else crop_size, square=True)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = OPENAI_CLIP_MEAN.copy() if image_mean is None else image_mean
        self.image_std = OPENAI_CLIP_STD.copy() if image_std is None else image_std
        self.do_convert_rgb = do_convert_rgb

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Does what `preprocess` does."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: dict[str, int] | int | tuple[int, int] | None = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: dict[str, int] | int | tuple[int, int] | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Collection[float] | None = None,
        image_std: float | Collection[float] | None = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | None = px.FIRST,
        input_data_format: str | None = None,
        num_workers: int | None = None,
    ) -> BatchFeature:
        """Preprocesses one image or many; arguments left at None are those of the constructor.

        Pixel values are expected in 0 to 255. Resizing works on 8 bits, as the former library's does: floating images
        in [0, 1] are multiplied by 255 and cut to integers for it, and divided by 255 afterwards.

        Layout of arrays: it is inferred for each image, from an axis of 1 or 3 entries, the first axis before the last.
        An image that fits both (3 x height x 3) has the layout of the call's first image, and channels first when that
        one fits both as well. ``input_data_format`` overrides all of it. A Pillow image has no such question: its
        layout is known, whatever its size.

        Args:
            images: A Pillow image of any mode, an array (numpy, torch, TensorFlow, JAX) of three axes, a batch of four,
                a path, the bytes of an image file, a base64 string or ``data:`` URL; or a list or tuple of those,
                nested at will. Files are turned upright by their EXIF orientation and converted to RGB, as in the
                former library; Pillow images are taken as they are.
            do_resize: As in the constructor.
            size: As in the constructor.
            resample: As in the constructor.
            do_center_crop: As in the constructor.
            crop_size: As in the constructor.
            do_rescale: As in the constructor.
            rescale_factor: As in the constructor.
            do_normalize: As in the constructor.
            image_mean: As in the constructor.
            image_std: As in the constructor.
            do_convert_rgb: As in the constructor.
            return_tensors: "np", "pt", "tf" or "jax" for one array; None for a list of numpy arrays.
            data_format: Layout of the result, "channels_first" or "channels_last"; None keeps each image's own.
            input_data_format: Layout of the arrays given, "channels_first" or "channels_last"; None infers it.
            num_workers: Threads that decode and resize. Default: one for each processor, at most 8 and at most one for
                each image; a single image is done without any.

        Returns:
            ``pixel_values``: [batch, channels, height, width], float32 when rescaling or normalising is on.

        Raises:
            ValueError: An image is unreadable, empty, a decompression bomb, or has an unsupported shape (the message
                names its index), or an option is invalid.
            TypeError: Something that is not an image was given.
        """
        return_tensors = check_tensor_type(return_tensors)
        layout_in, layout_out = (
            px.check_layout("input_data_format", input_data_format),
            px.check_layout("data_format", data_format),
        )
        size = _size_dict("size", _or(size, self.size), square=False)
        crop_size = _size_dict("crop_size", _or(crop_size, self.crop_size), square=True)
        normalize = _or(do_normalize, self.do_normalize)
        work = _Work(
            size=_Target(size) if _or(do_resize, self.do_resize) else None,
            resample=_or(resample, self.resample),
            crop=_height_width("crop_size", crop_size) if _or(do_center_crop, self.do_center_crop) else None,
            factor=_factor(_or(rescale_factor, self.rescale_factor)) if _or(do_rescale, self.do_rescale) else None,
            mean=_numbers("image_mean", _or(image_mean, self.image_mean)) if normalize else None,
            std=_numbers("image_std", _or(image_std, self.image_std)) if normalize else None,
            rgb=_or(do_convert_rgb, self.do_convert_rgb),
        )
        items = px.flatten(images)
        if not items:
            raise bad_input("images must hold at least one image", images, "Pass an image or a list of images")
        ambiguous = px.layout_of_first(items[0])
        batch = work.allocate(len(items))

        def run(index: int) -> np.ndarray:
            pixels, layout, quantised = work.geometry(index, items[index], layout_in, ambiguous)
            done = work.values(index, pixels, quantised, None if batch is None else batch[index])
            return done if (layout_out or layout) == px.FIRST else done.transpose(1, 2, 0)

        workers = _workers(num_workers, items)
        if workers == 1:
            rows = [run(index) for index in range(len(items))]
        else:
            with ThreadPoolExecutor(workers, thread_name_prefix="clipmb-images") as pool:
                rows = list(pool.map(run, range(len(items))))
        if return_tensors and batch is not None and layout_out and all(row.base is batch for row in rows):
            whole = batch if layout_out == px.FIRST else np.ascontiguousarray(batch.transpose(0, 2, 3, 1))
            return BatchFeature({"pixel_values": whole}, return_tensors)
        return BatchFeature({"pixel_values": rows}, return_tensors)

    def resize(
        self,
        image: np.ndarray,
        size: dict[str, int],
        resample: int = Image.Resampling.BICUBIC,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Resizes one array; see `preprocess` for the arguments. Returns uint8, or float32 for floats in [0, 1]."""

        def work(pixels: np.ndarray) -> np.ndarray:
            target = _Target(_size_dict("size", size, square=False))
            pixels, quantised = px.resize("The image", pixels, target(*pixels.shape[1:]), resample)
            return px.rescale(pixels, 1 / 255) if quantised else pixels

        return px.in_layout(image, data_format, input_data_format, work)

    def center_crop(
        self,
        image: np.ndarray,
        size: dict[str, int] | int,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Cuts one array, or pads it with zeros, to ``size`` around its centre."""
        height, width = _height_width("size", _size_dict("size", size, square=True))
        return px.in_layout(image, data_format, input_data_format, lambda pixels: px.crop(pixels, height, width))

    def rescale(
        self, image: np.ndarray, scale: float, data_format: str | None = None, input_data_format: str | None = None
    ) -> np.ndarray:
        """Multiplies one array by ``scale``, in float64, and returns float32."""
        return px.in_layout(image, data_format, input_data_format, lambda pixels: px.rescale(pixels, scale))

    def normalize(
        self,
        image: np.ndarray,
        mean: float | Iterable[float],
        std: float | Iterable[float],
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Computes ``(image - mean) / std`` for one array, in its own floating type, or float32 for integers."""
        means, stds = _numbers("mean", mean), _numbers("std", std)

        def work(pixels: np.ndarray) -> np.ndarray:
            px.check_channels("The image", len(pixels), means, stds)
            return px.normalize(pixels, means, stds)

        return px.in_layout(image, data_format, input_data_format, work)

    def fetch_images(self, images: Any) -> Any:
        """Replaces paths and base64 strings by RGB Pillow images, upright; lists keep their nesting."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        return px.open_image("The image", images) if isinstance(images, str | os.PathLike | bytes) else images

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, as they are written to preprocessor_config.json."""
        settings = copy.deepcopy(vars(self))
        name = settings.pop("_processor_class")
        if name is not None:
            settings["processor_class"] = name
        return settings | {"image_processor_type": "CLIPImageProcessor"}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds one from `to_dict`'s result; keyword arguments override entries.

        With ``return_unused_kwargs=True`` it returns a pair, with the keyword arguments that name no setting.
        """
        settings = dict(image_processor_dict)
        return_unused = kwargs.pop("return_unused_kwargs", False)
        known = {*vars(CLIPImageProcessor()), *settings, "use_square_size", "processor_class"}
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        processor = cls(**(settings | kwargs))
        if return_unused:
            return processor, unused
        if unused:
            logger.warning("CLIPImageProcessor has no settings %s; they are ignored.", sorted(unused))
        return processor

    def to_json_string(self) -> str:
        """Returns `to_dict` as JSON."""
        return json_text(self.to_dict())

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `to_json_string` to a file."""
        write_atomically(Path(json_file_path), self.to_json_string().encode())

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> CLIPImageProcessor:
        """Builds one from a file that `to_json_file` wrote."""
        return cls(**read_json(Path(json_file)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | Source, **kwargs: Any) -> Any:
        """Loads the settings from a folder, a hub id or a JSON file.

        The ``image_processor`` entry of processor_config.json (transformers 5) comes before preprocessor_config.json
        (transformers 4), as in transformers 5.

        Args:
            pretrained_model_name_or_path: Where they are.
            **kwargs: The options of `Source`, settings that override those in the file, and ``return_unused_kwargs``.
                Other names are ignored, with a log message.

        Raises:
            CheckpointError: There is no such file, or it holds no JSON object.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in ("_from_auto", "_from_pipeline")}
        source = Source.of(pretrained_model_name_or_path, kwargs)
        name = kwargs.pop("image_processor_filename", FILE)
        if Path(source.name_or_path).is_file():
            settings = read_json(Path(source.name_or_path))
            return cls.from_dict(settings.get("image_processor", settings), **kwargs)
        nested = source.find(PROCESSOR_FILE)
        settings = None if nested is None else read_json(nested).get("image_processor")
        if not isinstance(settings, dict):
            settings = read_json(source.require(name))
        return cls.from_dict(settings, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> list[str]:
        """Writes preprocessor_config.json into a folder, and returns its path in a list.

        Options are those of `clipmb.common.former.check_saving`.
        """
        check_saving({"push_to_hub": push_to_hub, **options})
        with Transaction(save_directory) as save:
            self._write(save)
        return [os.path.join(save_directory, FILE)]

    def _write(self, save: Transaction) -> None:
        """Adds the file to a save; a processor_config.json that is there must not keep saying something else."""
        save.write(FILE, self.to_json_string())
        beside = save.folder / PROCESSOR_FILE
        if beside.is_file() and "image_processor" in (whole := read_json(beside)):
            whole["image_processor"] = self.to_dict()
            save.write(PROCESSOR_FILE, json_text(whole))

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class CLIPFeatureExtractor(CLIPImageProcessor):
    """The former name of `CLIPImageProcessor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            "CLIPFeatureExtractor is deprecated. Use CLIPImageProcessor instead.", FutureWarning, stacklevel=2
        )
        super().__init__(*args, **kwargs)


@dataclass(frozen=True)
class _Work:
    """The checked options of one call, and the steps they ask for; a step that is off is None."""

    size: _Target | None
    resample: int
    crop: tuple[int, int] | None
    factor: float | None
    mean: tuple[float, ...] | float | None
    std: tuple[float, ...] | float | None
    rgb: bool

    def __post_init__(self) -> None:
        if self.size is not None and self.resample not in list(Image.Resampling):
            raise one_of("resample", self.resample, [int(filter_) for filter_ in Image.Resampling])
        if self.std is not None and not np.all(self.std):
            raise bad_input("image_std must not hold zeros", self.std, "Pass other values, or do_normalize=False")

    def allocate(self, count: int) -> np.ndarray | None:
        """Takes the memory of the whole batch, when options alone say which shape an RGB image comes out with."""
        fixed = self.crop or (self.size.fixed if self.size else None)
        plain = self.factor is None and self.mean is None
        return None if fixed is None else np.empty((count, 3, *fixed), np.uint8 if plain else np.float32)

    def geometry(self, index: int, item: Any, layout: str | None, ambiguous: str) -> tuple[np.ndarray, str, bool]:
        """Reads, resizes and crops one image.

        Returns:
            The pixels, [channels, height, width]; the layout in which they came; and whether they are 8-bit values that
            stand for floats in [0, 1].
        """
        name, quantised = f"Image {index}", False
        if isinstance(item, str | os.PathLike | bytes):
            item = px.open_image(name, item)
        if isinstance(item, Image.Image):
            layout, item = px.LAST, px.decode(name, item, self.rgb)
        if isinstance(item, Image.Image) and item.mode == "RGB" and self.size is not None:
            item = px.resize_pillow(name, item, self.size(item.height, item.width), self.resample)
            pixels = np.asarray(item).transpose(2, 0, 1)
        else:
            array = px.to_array(name, item)
            layout = layout or px.infer(name, array.shape, ambiguous)
            pixels = array if layout == px.FIRST else array.transpose(2, 0, 1)
            if index == 0 and self.factor is not None and px.is_scaled(array):
                log_once(
                    "The values of the first image lie between 0 and 1, as if they were rescaled already. "
                    "If so, pass do_rescale=False."
                )
            if self.size is not None:
                pixels, quantised = px.resize(name, pixels, self.size(*pixels.shape[1:]), self.resample)
        if self.crop is not None:
            pixels = px.crop(pixels, *self.crop)
        return pixels, layout or px.LAST, quantised

    def values(self, index: int, pixels: np.ndarray, quantised: bool, out: np.ndarray | None) -> np.ndarray:
        """Rescales and normalises [channels, height, width], into ``out`` when it fits there."""
        px.check_channels(f"Image {index}", len(pixels), self.mean, self.std)
        if pixels.dtype != np.uint8:
            return px.arithmetic(pixels, self.factor, self.mean, self.std)
        table = px.lookup_table(len(pixels), quantised, self.factor, self.mean, self.std)
        if out is None or out.shape != pixels.shape or out.dtype != table.dtype:
            out = np.empty(pixels.shape, table.dtype)
        for channel, plane in enumerate(pixels):
            np.take(table[channel], plane, out=out[channel], mode="clip")  # "raise" would go through a buffer
        return out


class _Target:
    """The size of the resized copy of an image, from the image's own."""

    def __init__(self, size: dict[str, int]) -> None:
        self.fixed = (size["height"], size["width"]) if {"height", "width"} <= set(size) else None
        self.shortest = size.get("shortest_edge", 0)
        if self.fixed is None and not self.shortest:
            raise bad_input("size must hold 'shortest_edge', or 'height' and 'width'", size, "Pass one of these")

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        if self.fixed is not None:
            return self.fixed
        short, long = sorted((height, width))
        longest = int(self.shortest * long / short)  # cut, not rounded
        return (longest, self.shortest) if width <= height else (self.shortest, longest)


# ---- options ---------------------------------------------------------------------------------------------------------


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _size_dict(field: str, size: Any, *, square: bool) -> dict[str, int]:
    """Brings every accepted form of a size into a dict of integers."""
    given = size
    if isinstance(size, int | np.integer) and not isinstance(size, bool):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, Mapping) or set(size) not in _SIZE_KEYS:
        raise bad_input(
            f"{field} must be an int, (height, width), or a dict with one of the key sets "
            f"{', '.join('/'.join(sorted(keys)) for keys in _SIZE_KEYS)}",
            given,
            f'Pass for example {field}={{"height": 224, "width": 224}}',
        )
    return {key: _pixels(f"{field}[{key!r}]", value) for key, value in size.items()}


def _pixels(field: str, value: Any) -> int:
    """Checks a number of pixels, which may be 224.0 in a file."""
    whole = isinstance(value, float | np.floating) and value.is_integer()
    return whole_number(field, int(value) if whole else value)


def _height_width(field: str, size: dict[str, int]) -> tuple[int, int]:
    if set(size) != {"height", "width"}:
        raise bad_input(f"{field} must hold 'height' and 'width'", size, "Pass these two")
    return size["height"], size["width"]


def _factor(factor: Any) -> float:
    if isinstance(factor, bool) or not isinstance(factor, int | float | np.number):
        raise bad_input(
            "rescale_factor must be a number when do_rescale is on", factor, "Pass one, or do_rescale=False"
        )
    return cast(float, factor)


def _numbers(field: str, values: Any) -> tuple[float, ...] | float:
    """Returns a number as it is, and a collection of numbers as a tuple, which can be a key of the tables' cache."""
    try:
        return tuple(float(value) for value in values) if np.ndim(values) else float(values)
    except (TypeError, ValueError):
        raise bad_input(
            f"{field} must be a number, or one for each channel, when do_normalize is on", values, f"Pass {field}="
        ) from None


def _workers(wanted: int | None, items: list[Any]) -> int:
    wanted = default_workers() if wanted is None else whole_number("num_workers", wanted)
    undecoded = [id(item) for item in items if px.pending(item)]
    if len(set(undecoded)) < len(undecoded):  # two threads must not decode the same object
        return 1
    return min(wanted, len(items))
