"""CLIP's image preprocessing as a part of an ONNX graph, with the bits of `CLIPImageProcessor`.

The size of the pictures is known when the graph runs, so that the graph computes Pillow's weights too: for each axis a
matrix, for the rows or columns that the crop keeps. A pass is a product in float64, which holds every sum exactly, and
is rounded and clipped to 8 bits. What a crop pads has weights of 0. What the 256 levels are after rescaling and
normalising is a table, as in the image processor.

Source: the arithmetic of the weights is that of Pillow, src/libImaging/Resample.c, as in ``_resize.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clipmb.common.config import CLIPVisionConfig
from clipmb.common.errors import bad_input
from clipmb.common.image.processor import CLIPImageProcessor
from clipmb.common.image.resampling import rule_name
from clipmb.onnx.graph import Graph

_UNIT = 1 << 22  # 1 as one of Pillow's weights, which are whole numbers


class Filter(NamedTuple):
    """A filter of Pillow: how far it reaches, in pixels, and its weight at a distance from 0 on."""

    reach: float
    weight: Callable[[Graph, str], str]


class Axis(NamedTuple):
    """A pass: its weights, (outputs, inputs) float64, and the (1,) first of the inputs and the (1,) end of them."""

    weights: str
    first: str
    end: str


def preprocess(graph: Graph, images: str, processor: CLIPImageProcessor, config: CLIPVisionConfig) -> str:
    """Turns pictures into the input of the vision tower.

    Args:
        graph: To which the nodes are added.
        images: (batch, height, width, 3) uint8, in RGB, of any size.
        processor: Whose settings are followed.
        config: Of the tower.

    Returns:
        (batch, 3, image_size, image_size) float32.

    Raises:
        ValueError: The processor does what the graph cannot do, or makes pictures of another size.
    """
    require(processor, config)
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    table = processor(
        levels, do_resize=False, do_center_crop=False, input_data_format="channels_last", return_tensors="np"
    )["pixel_values"]  # (1, 3, 1, 256)
    sizes = graph.size(images, 1), graph.size(images, 2)
    targets = _targets(graph, sizes, processor)
    filter_ = FILTERS[processor.resample]
    rows, columns = (_axis(graph, *axis, config.image_size, filter_) for axis in zip(sizes, targets, strict=True))
    first = graph.op("Concat", rows.first, columns.first, axis=0)
    end = graph.op("Concat", rows.end, columns.end, axis=0)
    pixels = graph.op("Slice", images, first, end, graph.integers(1, 2))
    pixels = graph.cast(graph.op("Transpose", pixels, perm=[0, 3, 1, 2]), np.float64)  # (batch, 3, rows, columns)
    across = graph.op("Transpose", columns.weights, perm=[1, 0])
    order = ORDERS[rule_name(processor.pass_order)]
    pixels = graph.choice(
        graph.op("Squeeze", order(graph, *sizes, *targets)),
        lambda: _pass(graph, _pass(graph, rows.weights, pixels), across),
        lambda: _pass(graph, rows.weights, _pass(graph, pixels, across)),
        np.float64,
    )
    places = graph.op("Add", graph.cast(pixels, np.int64), graph.constant([[[0]], [[256]], [[512]]], np.int64))
    return graph.op("Gather", graph.constant(table.reshape(-1), np.float32), places)


def require(processor: CLIPImageProcessor, config: CLIPVisionConfig) -> None:
    """Refuses image processors that a graph cannot follow.

    Raises:
        ValueError: The processor does what the graph cannot do, or makes pictures of another size.
    """
    if processor.do_resize and processor.resample not in FILTERS:
        raise bad_input(
            "with_preprocessing= has the filters 2 (bilinear) and 3 (bicubic)",
            f"resample={processor.resample} in the image processor",
            "Export without it, or save an image processor with resample=3 beside the model",
            shown=True,
        )
    size = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else {}
    side = config.image_size
    if (size.get("height"), size.get("width")) != (side, side) or config.num_channels != 3:
        raise bad_input(
            f"with_preprocessing= needs an image processor that makes 3 channels of {side} x {side} pixels",
            f"do_resize={processor.do_resize}, size={processor.size}, do_center_crop={processor.do_center_crop}, "
            f"crop_size={processor.crop_size}, {config.num_channels} channels",
            "Export without it, or correct preprocessor_config.json",
            shown=True,
        )


def _targets(graph: Graph, sizes: tuple[str, str], processor: CLIPImageProcessor) -> tuple[str, str]:
    """Returns the (1,) height and width before the crop; `clipmb.common.image.processor` has the rule."""
    if not processor.do_resize:
        return sizes
    if "height" in processor.size:
        return graph.integers(processor.size["height"]), graph.integers(processor.size["width"])
    shortest = graph.op("Min", *sizes)
    height, width = (graph.op("Mul", size, graph.integers(processor.size["shortest_edge"])) for size in sizes)
    return graph.op("Div", height, shortest), graph.op("Div", width, shortest)  # which cuts


def _axis(graph: Graph, size: str, target: str, count: int, filter_: Filter) -> Axis:
    """Computes the pass from size pixels to target pixels, of which count around the centre are wanted."""

    def number(value: float | np.ndarray) -> str:
        return graph.constant(value, np.float64)

    half, zero, one = number(0.5), number(0), number(1)
    inputs, outputs = graph.cast(size, np.float64), graph.cast(target, np.float64)
    excess = graph.op("Floor", graph.op("Mul", graph.op("Sub", outputs, number(count)), half))
    wanted = graph.op("Add", number(np.arange(count)[:, None]), excess)  # (outputs, 1); outside of the target: padding
    real = graph.op("And", graph.op("GreaterOrEqual", wanted, zero), graph.op("Less", wanted, outputs))
    scale = graph.op("Div", inputs, outputs)
    stretch = graph.op("Max", scale, one)
    reach = graph.op("Mul", number(filter_.reach), stretch)
    center = graph.op("Mul", graph.op("Add", wanted, half), scale)
    start = graph.op("Floor", graph.op("Add", graph.op("Sub", center, reach), half))
    end = graph.op("Floor", graph.op("Add", graph.op("Add", center, reach), half))
    start, end = graph.op("Max", start, zero), graph.op("Min", end, inputs)
    first = graph.cast(graph.op("ReduceMin", start, graph.integers(0, 1), keepdims=0), np.int64)
    last = graph.cast(graph.op("ReduceMax", end, graph.integers(0, 1), keepdims=0), np.int64)
    places = graph.cast(graph.op("Range", first, last, graph.constant(1, np.int64)), np.float64)  # (inputs,)
    distance = graph.op("Add", graph.op("Sub", places, center), half)
    distance = graph.op("Abs", graph.op("Mul", distance, graph.op("Div", one, stretch)))
    inside = graph.op("And", graph.op("GreaterOrEqual", places, start), graph.op("Less", places, end))
    weights = graph.op("Where", graph.op("And", inside, real), filter_.weight(graph, distance), zero)
    sums = graph.op("CumSum", weights, graph.constant(1, np.int64))  # one after the other, as in Pillow
    total = graph.op("Gather", sums, graph.integers(-1), axis=1)
    total = graph.op("Where", graph.op("Equal", total, zero), one, total)
    whole = graph.op("Mul", graph.op("Div", weights, total), number(_UNIT))
    away = graph.op("Where", graph.op("Less", whole, zero), number(-0.5), half)
    whole = graph.cast(graph.cast(graph.op("Add", away, whole), np.int64), np.float64)  # cut
    return Axis(whole, *(graph.op("Unsqueeze", end, graph.integers(0)) for end in (first, last)))


def _pass(graph: Graph, left: str, right: str) -> str:
    """Multiplies levels by weights, on either side, and makes levels of the sums."""
    sums = graph.op("MatMul", left, right)
    levels = graph.op("Mul", sums, graph.constant(1 / _UNIT, np.float64))
    levels = graph.op("Floor", graph.op("Add", levels, graph.constant(0.5, np.float64)))
    return graph.op("Clip", levels, graph.constant(0, np.float64), graph.constant(255, np.float64))


# ---- filters ---------------------------------------------------------------------------------------------------------


def _bilinear(graph: Graph, distance: str) -> str:
    one = graph.constant(1, np.float64)
    return graph.op("Max", graph.op("Sub", one, distance), graph.constant(0, np.float64))


def _bicubic(graph: Graph, distance: str) -> str:
    def polynomial(*factors: float) -> str:
        value = graph.constant(factors[0], np.float64)
        for factor in factors[1:]:
            value = graph.op("Mul", value, distance)
            value = graph.op("Add", value, graph.constant(factor, np.float64)) if factor else value
        return value

    near, far = polynomial(1.5, -2.5, 0, 1), polynomial(1, -5, 8, -4)
    far = graph.op("Mul", far, graph.constant(-0.5, np.float64))
    far = graph.op(
        "Where",
        graph.op("Less", distance, graph.constant(2, np.float64)),
        far,
        graph.constant(0, np.float64),
    )
    return graph.op("Where", graph.op("Less", distance, graph.constant(1, np.float64)), near, far)


FILTERS = {2: Filter(1.0, _bilinear), 3: Filter(2.0, _bicubic)}


# ---- whether the vertical pass comes first, from the (1,) height and width before and after --------------------------


def _never(graph: Graph, height: str, width: str, to_height: str, to_width: str) -> str:
    return graph.constant([False], bool)


def _far_taller(graph: Graph, height: str, width: str, to_height: str, to_width: str) -> str:
    taller = graph.op("Greater", height, graph.op("Mul", width, graph.integers(100)))
    return graph.op("And", taller, graph.op("Less", to_height, height))


def _fewer_pixels(graph: Graph, height: str, width: str, to_height: str, to_width: str) -> str:
    fewer = graph.op("Mul", graph.op("Sub", width, to_width), graph.integers(2))
    fewer = graph.op("Greater", graph.op("Sub", height, to_height), fewer)
    return graph.op("And", fewer, graph.op("Less", to_height, height))


ORDERS: dict[str, Callable[[Graph, str, str, str, str], str]] = {
    "horizontal first": _never,
    "vertical first from 100 times as tall as wide": _far_taller,
    "vertical first where it makes fewer pixels": _fewer_pixels,
}
