"""CLIP's image preprocessing: resize, centre crop, rescale, normalise, with the bits of transformers 4.

Rescaling and normalising an 8-bit image is a function of 256 values per channel. It is computed once into a table, with
the reference's operations in the reference's order, and looked up for each pixel; what remains is Pillow's resize.

Source: the arithmetic follows ``CLIPImageProcessor`` of transformers 4.57.6, against which tests/reference holds it.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from PIL import Image

from clipmb.common.errors import bad_input, boolean, log_once, logger, one_of, whole_number
from clipmb.common.features import BatchFeature, check_tensor_type
from clipmb.common.former import check_saving
from clipmb.common.hub import Source
from clipmb.common.image import pixels as px
from clipmb.common.image.resampling import Window, as_image, check_backend, check_order, rule_name
from clipmb.common.json_files import JsonSettings, json_text, read_json
from clipmb.common.saving import Transaction, read_whole
from clipmb.common.uploading import Uploadable, uploaded
from clipmb.common.workers import default_workers

# Red, green and blue, for values in [0, 1]. Source: github.com/openai/CLIP, clip/clip.py.
OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
_MOST_PIXELS = 65_535  # of one side, as of a JPEG
_LARGEST = 1 << 24  # pixels of a result, 200 MB in float32: more is a mistake or an attack


_SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
)


class CLIPImageProcessor(JsonSettings, Uploadable):
    """Turns images into the ``pixel_values`` of a CLIP model.

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
        image_mean: One number, or one per channel. Default: CLIP's, ``OPENAI_CLIP_MEAN``.
        image_std: One number, or one per channel. Default: CLIP's, ``OPENAI_CLIP_STD``.
        do_convert_rgb: Convert Pillow images to RGB. Arrays are never converted.
        resize_backend: What resizes: "native" is the compiled kernel, several times as fast; "pillow" is Pillow; "auto"
            is the kernel where it was compiled and has the bits of the installed Pillow. It is not saved.
        pass_order: The bits of resized images: "installed" gives those of the installed Pillow, which takes the
            vertical pass first for tall images since 12.2, and for more of them since 13.0; "horizontal" gives the
            same bits with every version, which are those of Pillow before 12.2.
        **kwargs: Kept as attributes and written back by `save_pretrained`, so that unknown entries of a file survive.

    Raises:
        ValueError: A size has unknown keys, a wrong length, or values that are not positive whole numbers.

    Source: the arithmetic follows ``CLIPImageProcessor`` of transformers 4.57.6, to the bit.
    """

    model_input_names: list[str] = ["pixel_values"]  # noqa: RUF012 - a public attribute in transformers
    is_fast = False

    def __init__(
        self,
        /,
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
        *,
        resize_backend: str = "auto",
        pass_order: str = "installed",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("feature_extractor_type", None)  # in files older than image processors
        kwargs.pop("image_processor_type", None)  # always this class when written
        named = kwargs.pop("_processor_class", None)
        self._processor_class: str | None = kwargs.pop("processor_class", None) or named
        square = kwargs.pop("use_square_size", False)  # in KOSMOS-2's files
        self._keep(kwargs)
        self.do_resize = boolean("do_resize", do_resize)
        self.size = _size_dict("size", {"shortest_edge": 224} if size is None else size, square=False)
        if square and "shortest_edge" in self.size:
            self.size = {"height": self.size["shortest_edge"], "width": self.size["shortest_edge"]}
        whole_number("resample", resample, 0, max(Image.Resampling))
        self.resample = resample
        self.do_center_crop = boolean("do_center_crop", do_center_crop)
        self.crop_size = _size_dict("crop_size", 224 if crop_size is None else crop_size, square=True)
        self.do_rescale = boolean("do_rescale", do_rescale)
        self.rescale_factor = rescale_factor if rescale_factor is None else _factor(rescale_factor)
        self.do_normalize = boolean("do_normalize", do_normalize)
        self.image_mean = OPENAI_CLIP_MEAN.copy() if image_mean is None else image_mean
        self.image_std = OPENAI_CLIP_STD.copy() if image_std is None else image_std
        for name in ("image_mean", "image_std"):
            _numbers(name, getattr(self, name))
        self.do_convert_rgb = boolean("do_convert_rgb", do_convert_rgb)
        self.resize_backend = check_backend(resize_backend)
        self.pass_order = check_order(pass_order)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Calls `preprocess`."""
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
        """Preprocesses one image or many. Arguments left at None take the constructor's values.

        Pixel values are expected in 0 to 255. Resizing works on 8 bits, as in transformers 4: floating images in [0, 1]
        are multiplied by 255 and truncated to integers before it, and divided by 255 after it.

        The layout of an array is inferred from an axis of 1 or 3 entries, the first axis before the last. An array that
        fits both layouts (3 x height x 3) takes that of the call's first image, or channels first when that one fits
        both as well. ``input_data_format`` overrides the inference. The layout of a Pillow image is always known.

        Args:
            images: A Pillow image of any mode, an array (numpy, torch, TensorFlow, JAX) of three axes, a batch of four,
                a path, the bytes of an image file, a base64 string or ``data:`` URL; or a list or tuple of those,
                nested to any depth. Files are turned upright by their EXIF orientation and converted to RGB, as in
                transformers 4; Pillow images are not turned.
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
            num_workers: Threads that decode and resize. Default: one for each processor, at most 8. There is never more
                than one for each image; a single image needs none.

        Returns:
            ``pixel_values``: [batch, channels, height, width], or [batch, height, width, channels] with
            ``data_format="channels_last"``; float32 when rescaling or normalising is on.

        Raises:
            ValueError: An image is unreadable, empty, a decompression bomb, or has an unsupported shape (the message
                names its index), or an option is invalid.
            TypeError: An item is not an image.
        """
        return_tensors = check_tensor_type(return_tensors)
        layout_in, layout_out = (
            px.check_layout("input_data_format", input_data_format),
            px.check_layout("data_format", data_format),
        )
        size = _size_dict("size", _or(size, self.size), square=False)
        crop_size = _size_dict("crop_size", _or(crop_size, self.crop_size), square=True)
        crop = _height_width("crop_size", crop_size) if _or(do_center_crop, self.do_center_crop) else None
        normalize = _or(do_normalize, self.do_normalize)
        work = _Work(
            size=_Target(size) if _or(do_resize, self.do_resize) else None,
            resizing=self._resizing(_or(resample, self.resample), crop),
            crop=crop,
            factor=_factor(_or(rescale_factor, self.rescale_factor)) if _or(do_rescale, self.do_rescale) else None,
            mean=_numbers("image_mean", _or(image_mean, self.image_mean)) if normalize else None,
            std=_numbers("image_std", _or(image_std, self.image_std)) if normalize else None,
            rgb=_or(do_convert_rgb, self.do_convert_rgb),
        )
        items = px.flatten(images)
        if not items:
            raise bad_input("images must hold at least one image", images, "Pass an image or a list of images")
        ambiguous = px.layout_of_first(items[0])
        planar = layout_out != px.LAST
        batch = work.allocate(len(items), planar)

        def run(index: int) -> np.ndarray:
            pixels, layout, quantised = work.geometry(index, items[index], layout_in, ambiguous)
            done = work.values(index, pixels, quantised, planar, None if batch is None else batch[index])
            return done if planar == ((layout_out or layout) == px.FIRST) else done.transpose(1, 2, 0)

        workers = _workers(num_workers, items)
        if workers == 1:
            rows = [run(index) for index in range(len(items))]
        else:
            with ThreadPoolExecutor(workers, thread_name_prefix="clipmb-images") as pool:
                rows = list(pool.map(run, range(len(items))))
        if return_tensors and batch is not None and layout_out and all(row.base is batch for row in rows):
            return BatchFeature({"pixel_values": batch}, return_tensors)
        return BatchFeature({"pixel_values": rows}, return_tensors)

    def resize(
        self,
        image: np.ndarray,
        size: dict[str, int] | int | tuple[int, int],
        resample: int = Image.Resampling.BICUBIC,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Resizes one array with a filter of Pillow, on 8 bits.

        Args:
            image: Three axes, with 1 to 4 channels on the first or last: integral values in [0, 255], or floats in
                [0, 1].
            size: As in the constructor.
            resample: Pillow's resampling filter, 0 to 5; 3 is bicubic.
            data_format: Layout of the result, "channels_first" or "channels_last"; None keeps the layout.
            input_data_format: Layout of ``image``; None infers it from an axis of 1 or 3 channels.

        Returns:
            uint8, or float32 multiples of 1/255 where ``image`` holds floats in [0, 1].

        Raises:
            ValueError: The shape or the values are not those of an image, or an option is invalid.
            TypeError: ``image`` is not an array.

        Source: ``image_transforms.resize`` of transformers 4.57.6.
        """

        def work(pixels: np.ndarray) -> np.ndarray:
            target = _Target(_size_dict("size", size, square=False))
            resized, quantised = px.resize("The image", pixels, target(*pixels.shape[1:]), self._resizing(resample))
            resized = resized.pixels() if isinstance(resized, Window) else resized
            return px.rescale(resized, 1 / 255) if quantised else resized

        return px.in_layout(image, data_format, input_data_format, work)

    def center_crop(
        self,
        image: np.ndarray,
        size: dict[str, int] | int,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Cuts one array, or pads it with zeros, to a size around its centre.

        Args:
            image: Three axes, with the channels on the first or last, of any dtype.
            size: ``{"height": pixels, "width": pixels}``; an int is a square.
            data_format: Layout of the result, "channels_first" or "channels_last"; None keeps the layout.
            input_data_format: Layout of ``image``; None infers it from an axis of 1 or 3 channels.

        Returns:
            The part, of the dtype of ``image``. With an odd remainder, one more row or column is cut after the part
            than before it, and one more is padded before it.

        Raises:
            ValueError: The shape is not that of an image, or an option is invalid.
            TypeError: ``image`` is not an array.

        Source: ``image_transforms.center_crop`` of transformers 4.57.6.
        """
        height, width = _height_width("size", _size_dict("size", size, square=True))
        return px.in_layout(image, data_format, input_data_format, lambda pixels: px.crop(pixels, height, width))

    def rescale(
        self, image: np.ndarray, scale: float, data_format: str | None = None, input_data_format: str | None = None
    ) -> np.ndarray:
        """Multiplies one array by a number, in float64.

        Args:
            image: Three axes, with the channels on the first or last.
            scale: The factor.
            data_format: Layout of the result, "channels_first" or "channels_last"; None keeps the layout.
            input_data_format: Layout of ``image``; None infers it from an axis of 1 or 3 channels.

        Returns:
            The product, rounded to float32.

        Raises:
            ValueError: The shape is not that of an image, or a layout is unknown.
            TypeError: ``image`` is not an array.
        """
        return px.in_layout(image, data_format, input_data_format, lambda pixels: px.rescale(pixels, scale))

    def normalize(
        self,
        image: np.ndarray,
        mean: float | Iterable[float],
        std: float | Iterable[float],
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Computes ``(image - mean) / std`` for one array.

        Args:
            image: Three axes, with the channels on the first or last.
            mean: One number, or one per channel.
            std: One number, or one per channel.
            data_format: Layout of the result, "channels_first" or "channels_last"; None keeps the layout.
            input_data_format: Layout of ``image``; None infers it from an axis of 1 or 3 channels.

        Returns:
            The result in the floating type of ``image``, or in float32 for integers.

        Raises:
            ValueError: The shape is not that of an image, there is not one mean and deviation per channel, or a layout
                is unknown.
            TypeError: ``image`` is not an array.
        """
        means, stds = _numbers("mean", mean), _numbers("std", std)

        def work(pixels: np.ndarray) -> np.ndarray:
            px.check_channels("The image", len(pixels), means, stds)
            return px.normalize(pixels, means, stds)

        return px.in_layout(image, data_format, input_data_format, work)

    def _resizing(self, resample: int, crop: tuple[int, int] | None = None) -> px.Resizing:
        return px.Resizing(resample, check_backend(self.resize_backend), check_order(self.pass_order), crop)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads paths, bytes and base64 strings as upright RGB Pillow images; lists stay nested, other items stay."""
        images = image_url_or_urls
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str | os.PathLike | bytes):
            return as_image(px.read_image("The image", images))
        return images

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings, as they are written to preprocessor_config.json."""
        settings = copy.deepcopy(vars(self))
        settings.update(settings.pop("_kept"))
        del settings["resize_backend"]  # which changes no pixel, and is not there everywhere
        if settings["pass_order"] == "installed":
            del settings["pass_order"]
        name = settings.pop("_processor_class")
        if name is not None:
            settings["processor_class"] = name
        return settings | {"image_processor_type": f"CLIPImageProcessor{'Fast' if self.is_fast else ''}"}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that pixel values depend on, the order of the passes of a resize included."""
        named = ("image_processor_type", "processor_class", "feature_extractor_type")
        settings = {name: value for name, value in self.to_dict().items() if name not in named}
        settings["pass_order"] = rule_name(self.pass_order)
        return sha256(json_text(settings).encode()).hexdigest()

    @classmethod
    def _build(
        cls, entries: dict[str, Any], changes: dict[str, Any], return_unused: bool
    ) -> Self | tuple[Self, dict[str, Any]]:
        known = {*vars(CLIPImageProcessor()), *entries, "use_square_size", "processor_class"}
        unused = {name: value for name, value in changes.items() if name not in known}
        processor = cls(**{**entries, **{name: value for name, value in changes.items() if name in known}})
        if return_unused:
            return processor, unused
        if unused:
            logger.warning("CLIPImageProcessor has no settings %s; they are ignored.", sorted(unused))
        return processor

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | Source, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the settings and returns them with the options that are not about where they are."""
        entries, changes, _ = cls._read(pretrained_model_name_or_path, kwargs)
        return entries, changes

    @classmethod
    def _read(
        cls, name_or_path: str | os.PathLike[str] | Source, options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        changes = {name: value for name, value in options.items() if name not in ("_from_auto", "_from_pipeline")}
        source = Source.of(name_or_path, changes)
        name = changes.pop("image_processor_filename", None) or FILE

        def read() -> tuple[dict[str, Any], dict[str, Any], str]:
            if Path(source.name_or_path).is_file():
                content = read_json(Path(source.name_or_path))
                nested = content.get("image_processor")
                return nested if isinstance(nested, dict) else content, changes, source.name_or_path
            beside = source.find(PROCESSOR_FILE)
            nested = None if beside is None else read_json(beside).get("image_processor")
            if isinstance(nested, dict):
                return nested, changes, f"image_processor of {beside}"
            path = source.require(name)
            return read_json(path), changes, str(path)

        return read_whole(source.folder, read)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> list[str]:
        """Writes preprocessor_config.json into a folder, all or nothing.

        Args:
            save_directory: The folder; created when it is missing.
            push_to_hub: Also upload the file, with the options of `push_to_hub`; ``repo_id`` may be left out.
            **options: The arguments of transformers 4's `save_pretrained`.

        Returns:
            The path of the file, in a list; an empty one with ``is_main_process=False``.

        Raises:
            ValueError: ``save_directory`` is a file.
        """
        options["push_to_hub"] = push_to_hub
        if not check_saving(options):
            return []
        with uploaded(self, save_directory, options), Transaction(save_directory) as save:
            self._write(save)
        return [os.path.join(save_directory, FILE)]

    def _write(self, save: Transaction) -> None:
        """Adds the file to a save, and updates a processor_config.json that has an entry of its own."""
        save.write(FILE, self.to_json_string())
        beside = save.folder / PROCESSOR_FILE
        if beside.is_file() and "image_processor" in (whole := read_json(beside)):
            whole["image_processor"] = self.to_dict()
            save.write(PROCESSOR_FILE, json_text(whole))

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class CLIPImageProcessorFast(CLIPImageProcessor):
    """`CLIPImageProcessor` under the name of transformers' torchvision one, with its arguments.

    The pixels are `CLIPImageProcessor`'s: Pillow's bits, not torchvision's.
    """

    is_fast = True

    def preprocess(
        self, images: Any, *args: Any, device: Any = None, disable_grouping: bool | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Preprocesses one image or many; arguments and errors as in `CLIPImageProcessor.preprocess`.

        Args:
            images: As there.
            *args: As there.
            device: Where the result is put, with ``return_tensors="pt"``; the work is done on the CPU.
            disable_grouping: Changes nothing: how transformers' class batches images of one size.
            **kwargs: As there.

        Returns:
            As there.

        Raises:
            ValueError: As there, or the result would be no tensor of PyTorch and ``device`` is another than the CPU.
            TypeError: As there.
        """
        features = super().preprocess(images, *args, **kwargs)
        if device is not None and str(device) != "cpu":
            if not hasattr(features["pixel_values"], "is_floating_point"):
                raise bad_input("Only PyTorch's tensors are put on a device", device, 'Pass return_tensors="pt"')
            features = features.to(device)
        return features


class CLIPFeatureExtractor(CLIPImageProcessor):
    """Deprecated name of `CLIPImageProcessor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            "CLIPFeatureExtractor is deprecated. Use CLIPImageProcessor instead.", FutureWarning, stacklevel=2
        )
        super().__init__(*args, **kwargs)


@dataclass(frozen=True)
class _Work:
    """The checked options of one call and its steps; a step that is off is None."""

    size: _Target | None
    resizing: px.Resizing
    crop: tuple[int, int] | None
    factor: float | None
    mean: tuple[float, ...] | float | None
    std: tuple[float, ...] | float | None
    rgb: bool

    def __post_init__(self) -> None:
        if self.size is not None and self.resizing.resample not in list(Image.Resampling):
            raise one_of("resample", self.resizing.resample, [int(filter_) for filter_ in Image.Resampling])
        if self.std is not None and not np.all(np.asarray(self.std, np.float32)):
            raise bad_input("image_std must not hold zeros", self.std, "Pass other values, or do_normalize=False")

    def allocate(self, count: int, planar: bool) -> np.ndarray | None:
        """Allocates the memory of the batch when the options alone determine the shape of an RGB image."""
        fixed = self.crop or (self.size.fixed if self.size else None)
        if fixed is None:
            return None
        plain = self.factor is None and self.mean is None
        return np.empty((count, 3, *fixed) if planar else (count, *fixed, 3), np.uint8 if plain else np.float32)

    def geometry(
        self, index: int, item: Any, layout: str | None, ambiguous: str
    ) -> tuple[np.ndarray | Window, str, bool]:
        """Reads, resizes and crops one image.

        Returns:
            The pixels, [channels, height, width], perhaps yet to be computed; the layout of the input; and whether they
            are 8-bit values that represent floats in [0, 1].
        """
        name = f"Image {index}"
        if isinstance(item, str | os.PathLike | bytes):
            layout, item = px.LAST, px.read_image(name, item)
        if isinstance(item, Image.Image):
            layout, item = px.LAST, px.decode(name, item, self.rgb)
        if isinstance(item, Image.Image) and item.mode == "RGB" and self.size is not None:
            return self.resizing(name, item, self.size(item.height, item.width)), px.LAST, False
        array = px.to_array(name, item)
        layout = layout or px.infer(name, array.shape, ambiguous)
        pixels = array if layout == px.FIRST else array.transpose(2, 0, 1)
        if index == 0 and self.factor is not None and px.is_scaled(array):
            log_once(
                "The values of the first image lie between 0 and 1, as if they were rescaled already. "
                "If so, pass do_rescale=False."
            )
        if self.size is not None:
            resized, quantised = px.resize(name, pixels, self.size(*pixels.shape[1:]), self.resizing)
            return resized, layout, quantised
        return pixels if self.crop is None else px.crop(pixels, *self.crop), layout, False

    def values(
        self, index: int, pixels: np.ndarray | Window, quantised: bool, planar: bool, out: np.ndarray | None
    ) -> np.ndarray:
        """Rescales and normalises one image.

        Args:
            index: The number of the image, for messages.
            pixels: [channels, height, width], or a window that is yet to be computed.
            quantised: The pixels are 8-bit values that represent floats in [0, 1].
            planar: Return [channels, height, width]; otherwise [height, width, channels].
            out: The memory of the result, used where shape and dtype agree.
        """
        channels, height, width = pixels.shape
        px.check_channels(f"Image {index}", channels, self.mean, self.std)
        if isinstance(pixels, np.ndarray) and pixels.dtype != np.uint8:
            done = px.arithmetic(pixels, self.factor, self.mean, self.std)
            return done if planar else done.transpose(1, 2, 0)
        table = px.lookup_table(channels, quantised, self.factor, self.mean, self.std)
        shape = (channels, height, width) if planar else (height, width, channels)
        if out is None or out.shape != shape or out.dtype != table.dtype:
            out = np.empty(shape, table.dtype)
        if isinstance(pixels, Window):
            if table.dtype == np.float32:
                pixels.write(out, table, planar)
                return out
            pixels = pixels.pixels()
        planes = out if planar else out.transpose(2, 0, 1)
        for channel, plane in enumerate(pixels):
            np.take(table[channel], plane, out=planes[channel], mode="clip")  # "raise" would go through a buffer
        return out


class _Target:
    """Computes the size of the resized image from the size of the original."""

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
    """Converts every accepted form of a size to a dict of integers."""
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
    sides = {key: _pixels(f"{field}[{key!r}]", value) for key, value in size.items()}
    if min(sides.values()) * max(sides.values()) > _LARGEST:
        raise bad_input(f"{field} must have at most {_LARGEST:,} pixels", given, "Choose a smaller one")
    return sides


def _pixels(field: str, value: Any) -> int:
    """Checks a number of pixels, which may be 224.0 in a file."""
    whole = isinstance(value, float | np.floating) and value.is_integer()
    return whole_number(field, int(value) if whole else value, 1, _MOST_PIXELS)


def _height_width(field: str, size: dict[str, int]) -> tuple[int, int]:
    if set(size) != {"height", "width"}:
        raise bad_input(f"{field} must hold 'height' and 'width'", size, "Pass these two")
    return size["height"], size["width"]


def _factor(factor: Any) -> float:
    try:
        known = isinstance(factor, int | float | np.number) and not isinstance(factor, bool) and np.isfinite(factor)
    except TypeError:  # an integer that no float can hold
        known = False
    if not known:
        raise bad_input(
            "rescale_factor must be a finite number when do_rescale is on", factor, "Pass one, or do_rescale=False"
        )
    return cast(float, factor)


def _numbers(field: str, values: Any) -> tuple[float, ...] | float:
    """Returns a number as a float and a collection as a tuple, which can be a key of the cached tables."""
    try:
        numbers = tuple(float(value) for value in values) if np.ndim(values) else float(values)
        if not np.all(np.isfinite(numbers)):
            raise ValueError
        return numbers
    except (TypeError, ValueError, OverflowError):
        raise bad_input(
            f"{field} must be a finite number, or one for each channel, when do_normalize is on",
            values,
            f"Correct {field}",
        ) from None


def _workers(wanted: int | None, items: list[Any]) -> int:
    wanted = default_workers() if wanted is None else whole_number("num_workers", wanted)
    undecoded = [id(item) for item in items if px.pending(item)]
    if len(set(undecoded)) < len(undecoded):  # two threads must not decode the same object
        return 1
    return min(wanted, len(items))
