"""CLIP as an ONNX graph, straight from canonical weights.

It reads beside the modeling files of the frameworks: the same parts in the same order. What is a module there is a
function here, which adds nodes to a graph; names that it takes and returns are those of values in the graph.

Shapes: batch, seq (tokens, or patches + 1), width, heads, head_dim, patches, proj. Source of the behaviour: as in
`clipmb.pt.modeling`. Source of the operators: ONNX's operator set 20, github.com/onnx/onnx, docs/Operators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clipmb.common.checkpoint.tensors import rounded
from clipmb.common.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import one_of

OPSET, IR_VERSION = 20, 9
LARGEST = 1_900_000_000  # bytes of constants in one file; protobuf ends at 2 GiB
TOWERS = ("image", "text", "both")
_MOST_INT8 = 127  # of two neighbours of one sign together, before they are rounded
Pick = Callable[[str], str]  # takes one row of each item of a batch: (batch, seq, …) to (batch, 1, …)


class Graph:
    """Nodes and constants of a graph that is being built.

    Args:
        weights: Canonical name to array, in canonical layout.
        dtype: What is computed in: "float32", "float16" or "float64".
        quantised: Multiply by the weights of the blocks in 8-bit integers, each column with a scale of its own; what
            they are multiplied with is quantised when it is known.
        keep: Canonical names of weights that are not quantised.
        names: What inputs and outputs with other names are called.

    Attributes:
        tensors: The constants, name to array.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float32",
        quantised: bool = False,
        keep: Collection[str] = (),
        names: Mapping[str, str | None] | None = None,
    ) -> None:
        self.weights, self.quantised, self.keep, self.names = weights, quantised, frozenset(keep), names or {}
        self.dtype = np.dtype(dtype)
        self.tensors: dict[str, np.ndarray] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._named = 0
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._quantised: dict[str, tuple[str, str, str]] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or a list where it has several."""
        names = [f"{kind}_{self._named}_{i}" for i in range(outputs)]
        self._named += 1
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def choice(self, condition: str, yes: Callable[[], str], no: Callable[[], str], dtype: Any) -> str:
        """Adds two computations, of which one is run.

        Args:
            condition: A bool.
            yes: Adds the nodes that are run where it is true; returns the name of their result.
            no: Likewise where it is false.
            dtype: Of the results.
        """
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        outer, branches = self._nodes, {}
        for side, build in (("then_branch", yes), ("else_branch", no)):
            self._nodes = []
            output = helper.make_tensor_value_info(build(), kind, None)
            branches[side] = helper.make_graph(self._nodes, side, [], [output])
        self._nodes = outer
        return self.op("If", condition, **branches)

    def constant(self, value: Any, dtype: Any = None, name: str | None = None) -> str:
        """Adds a constant, of the graph's own dtype when none is given."""
        kind = self.dtype if dtype is None else np.dtype(dtype)
        array = np.asarray(rounded(np.asarray(value), kind), order="C")
        name = name or f"constant_{len(self.tensors)}"
        self.tensors[name] = array
        return name

    def integers(self, *values: int) -> str:
        """Adds a list of int64."""
        return self.constant(values, np.int64, "integers_" + "_".join(map(str, values)))

    def parameter(self, name: str, change: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
        """Adds a parameter under its canonical name, perhaps in another layout."""
        if name in self.tensors:
            return name
        array = self.weights[name]
        return self.constant(array if change is None else change(array), name=name)

    def size(self, value: str, axis: int) -> str:
        """Returns one size of a value, (1,) int64."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def cast(self, value: str, dtype: Any) -> str:
        """Converts a value to a dtype."""
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> str:
        """Declares an input; a size that is a word may be any. Returns its name."""
        name = self.names.get(name) or name
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str]) -> None:
        """Declares an output, in float32, or in float64 where the graph computes in that."""
        name = self.names.get(name) or name
        wide = np.promote_types(self.dtype, np.float32)
        self._nodes.append(
            helper.make_node("Cast", [value], [name], to=helper.np_dtype_to_tensor_dtype(wide))
            if wide != self.dtype
            else helper.make_node("Identity", [value], [name])
        )
        self._outputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(wide), shape))

    def model(self, *, embedded: bool, location: str = "memory") -> onnx.ModelProto:
        """Returns the graph as a model.

        Args:
            embedded: With the constants inside, which a model of at most 2 GB can hold; otherwise the large ones lie
                in a file, or with the runtime, which is given `tensors`.
            location: The name of that file, in which they follow each other.
        """
        graph = helper.make_graph(self._nodes, "clip", self._inputs, self._outputs)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="clipmb"
        )
        constants, offset = model.graph.initializer, 0  # where they are, as what is put into another message is copied
        for name, array in self.tensors.items():
            if embedded or not self.is_large(array):
                constants.append(numpy_helper.from_array(array, name))
                continue
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            named = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
                named.external_data.add(key=key, value=str(value))
            offset += array.nbytes
            constants.append(named)
        return model

    def save(self, path: Path, largest: int = LARGEST) -> list[Path]:
        """Writes the graph, with its large constants in a second file, ``….onnx_data``, where one would be too large.

        Args:
            path: The file, ``….onnx``.
            largest: Bytes of constants in one file.

        Returns:
            The files written.
        """
        large = [array for array in self.tensors.values() if self.is_large(array)]
        if sum(array.nbytes for array in large) <= largest:
            path.write_bytes(self.model(embedded=True).SerializeToString())
            return [path]
        beside = path.with_name(f"{path.name}_data")
        path.write_bytes(self.model(embedded=False, location=beside.name).SerializeToString())
        with open(beside, "wb") as file:
            for array in large:
                file.write(array.data)
        return [path, beside]

    @staticmethod
    def is_large(array: np.ndarray) -> bool:
        """Whether a constant is data rather than part of the computation, such as a shape."""
        return array.nbytes >= 1024


# ---- layers ----------------------------------------------------------------------------------------------------------


def linear(graph: Graph, x: str, stem: str, bias: bool = True) -> str:
    """(…, in) to (…, out)."""
    name = f"{stem}.weight"
    if graph.quantised and bias and name not in graph.keep:
        x = _quantised_product(graph, x, name)
    else:
        x = graph.op("MatMul", x, graph.parameter(name, np.transpose))
    return graph.op("Add", x, graph.parameter(f"{stem}.bias")) if bias else x


def _quantised_product(graph: Graph, x: str, name: str) -> str:
    """Multiplies by a weight in 8 bits: x with 256 levels between its extremes, each weight row with up to 255.

    On a processor without VNNI, onnxruntime adds two neighbouring products in 16 bits, which saturate: the scale of
    an output is such that no two neighbours of one sign add up to more than 128.
    """
    if x not in graph._quantised:
        levels, scale, zero = graph.op("DynamicQuantizeLinear", x, outputs=3)
        graph._quantised[x] = levels, scale, zero
    levels, scale, zero = graph._quantised[x]
    columns = graph.weights[name].T.astype(np.float32)  # (in, out)
    padded = np.pad(columns, ((0, 1), (0, 0)))
    pairs = [part[:-1] + part[1:] for part in (np.maximum(padded, 0), np.maximum(-padded, 0))]
    scales = np.max(pairs, axis=(0, 1)) / _MOST_INT8
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    whole = graph.constant(np.rint(columns / scales), np.int8, f"{name}.int8")
    product = graph.op("MatMulInteger", levels, whole, zero)
    factor = graph.op("Mul", scale, graph.constant(scales, name=f"{name}.scale"))
    return graph.op("Mul", graph.cast(product, np.float32), factor)


def layer_norm(graph: Graph, x: str, stem: str, config: CLIPTextConfig | CLIPVisionConfig) -> str:
    """(…, width) to the same; statistics in float32, or in float64."""
    scale, shift = graph.parameter(f"{stem}.weight"), graph.parameter(f"{stem}.bias")
    if graph.dtype != np.float64:
        return graph.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=config.layer_norm_eps)
    last = graph.integers(-1)  # the operator's epsilon is a float32
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, last))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), last)
    deviation = graph.op("Sqrt", graph.op("Add", variance, graph.constant(config.layer_norm_eps)))
    return graph.op("Add", graph.op("Mul", graph.op("Div", centred, deviation), scale), shift)


def quick_gelu(graph: Graph, x: str) -> str:
    """Sigmoid approximation of GELU, ``x * sigmoid(1.702 * x)``; (…) to the same."""
    return graph.op("Mul", x, graph.op("Sigmoid", graph.op("Mul", x, graph.constant(1.702))))


def gelu(graph: Graph, x: str) -> str:
    """GELU, ``x`` times the normal distribution function; (…) to the same."""
    if graph.dtype == np.float64:  # of which onnxruntime has no Gelu
        return _halved(graph, x, graph.op("Erf", graph.op("Mul", x, graph.constant(math.sqrt(0.5)))))
    return graph.op("Gelu", x)


def gelu_tanh(graph: Graph, x: str) -> str:
    """Approximation of GELU by the hyperbolic tangent; (…) to the same."""
    if graph.dtype == np.float64:
        return _tanh_gate(graph, x, math.sqrt(2 / math.pi))
    return graph.op("Gelu", x, approximate="tanh")


def _halved(graph: Graph, x: str, gate: str) -> str:
    """``0.5 * x * (1 + gate)``."""
    return graph.op("Mul", graph.op("Mul", x, graph.constant(0.5)), graph.op("Add", gate, graph.constant(1)))


def _tanh_gate(graph: Graph, x: str, factor: float) -> str:
    cubic = graph.op("Mul", graph.op("Mul", graph.constant(0.044715), x), x)
    inner = graph.op("Mul", graph.op("Mul", x, graph.constant(factor)), graph.op("Add", cubic, graph.constant(1)))
    return _halved(graph, x, graph.op("Tanh", inner))


def _laplace(graph: Graph, x: str) -> str:
    scaled = graph.op("Div", graph.op("Sub", x, graph.constant(0.707107)), graph.constant(0.282095 * math.sqrt(2)))
    return graph.op("Mul", graph.op("Add", graph.op("Erf", scaled), graph.constant(1)), graph.constant(0.5))


def _between(graph: Graph, x: str, low: float, high: float) -> str:
    return graph.op("Clip", x, graph.constant(low), graph.constant(high))


def _silu(graph: Graph, x: str) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def _relu_squared(graph: Graph, x: str) -> str:
    positive = graph.op("Relu", x)
    return graph.op("Mul", positive, positive)


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": gelu,
    "gelu_10": lambda graph, x: _between(graph, gelu(graph, x), -10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": lambda graph, x: _tanh_gate(graph, x, 0.7978845608),
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": _laplace,
    "leaky_relu": lambda graph, x: graph.op("Max", x, graph.op("Mul", x, graph.constant(0.01))),
    "linear": lambda graph, x: x,
    "mish": lambda graph, x: graph.op("Mish", x),
    "quick_gelu": quick_gelu,
    "relu": lambda graph, x: graph.op("Relu", x),
    "relu2": _relu_squared,
    "relu6": lambda graph, x: _between(graph, x, 0, 6),
    "sigmoid": lambda graph, x: graph.op("Sigmoid", x),
    "silu": _silu,
    "swish": _silu,
    "tanh": lambda graph, x: graph.op("Tanh", x),
}


# ---- blocks ----------------------------------------------------------------------------------------------------------


def attention(
    graph: Graph,
    hidden_states: str,
    stem: str,
    config: CLIPTextConfig | CLIPVisionConfig,
    bias: str | None,
    asking: str | None = None,
) -> str:
    """Multi-head self-attention: (batch, seq, width) to the same, or to the rows (batch, rows, width) that ask."""
    split = graph.integers(0, 0, config.num_attention_heads, config.head_dim)

    def heads(x: str, name: str, axes: Sequence[int]) -> str:
        return graph.op("Transpose", graph.op("Reshape", linear(graph, x, f"{stem}.{name}"), split), perm=axes)

    query = heads(asking or hidden_states, "q_proj", [0, 2, 1, 3])  # (batch, heads, rows, head_dim)
    key = heads(hidden_states, "k_proj", [0, 2, 3, 1])  # (batch, heads, head_dim, seq)
    value = heads(hidden_states, "v_proj", [0, 2, 1, 3])
    query = graph.op("Mul", query, graph.constant(config.head_dim**-0.5))
    scores = graph.op("MatMul", query, key)  # (batch, heads, rows, seq)
    if bias is not None:
        scores = graph.op("Add", scores, bias)
    narrow = graph.dtype == np.float16  # statistics in float32
    weights = graph.op("Softmax", graph.cast(scores, np.float32) if narrow else scores, axis=-1)
    context = graph.op("MatMul", graph.cast(weights, np.float16) if narrow else weights, value)
    context = graph.op("Transpose", context, perm=[0, 2, 1, 3])  # (batch, rows, heads, head_dim)
    context = graph.op("Reshape", context, graph.integers(0, 0, config.hidden_size))
    return linear(graph, context, f"{stem}.out_proj")


def mlp(graph: Graph, hidden_states: str, stem: str, config: Any) -> str:
    """The two-layer perceptron of a block: (batch, seq, width) to the same."""
    activation = ACTIVATIONS[config.hidden_act]
    return linear(graph, activation(graph, linear(graph, hidden_states, f"{stem}.fc1")), f"{stem}.fc2")


def encoder_layer(
    graph: Graph,
    hidden_states: str,
    stem: str,
    config: CLIPTextConfig | CLIPVisionConfig,
    bias: str | None,
    pick: Pick | None = None,
) -> str:
    """One block: attention and perceptron, each behind a layer norm and beside a residual; of picked rows only."""
    normed = asking = layer_norm(graph, hidden_states, f"{stem}.layer_norm1", config)
    if pick is not None:
        hidden_states, asking = pick(hidden_states), pick(normed)
        bias = bias and graph.op("Unsqueeze", pick(graph.op("Squeeze", bias, graph.integers(1))), graph.integers(1))
    context = attention(graph, normed, f"{stem}.self_attn", config, bias, asking)
    hidden_states = graph.op("Add", hidden_states, context)
    normed = layer_norm(graph, hidden_states, f"{stem}.layer_norm2", config)
    return graph.op("Add", hidden_states, mlp(graph, normed, f"{stem}.mlp", config))


def encoder(
    graph: Graph,
    hidden_states: str,
    stem: str,
    config: CLIPTextConfig | CLIPVisionConfig,
    bias: str | None = None,
    pick: Pick | None = None,
) -> list[str]:
    """Runs the blocks of a tower over (batch, seq, width); returns what enters the first and what each makes of it.

    The last block computes only the rows that ``pick`` takes, (batch, 1, width), where it is given: a pooled state
    depends on no other, and a 14th of ViT-B/32 is saved.
    """
    states, last = [hidden_states], config.num_hidden_layers - 1
    for i in range(config.num_hidden_layers):
        own = pick if i == last else None
        states.append(encoder_layer(graph, states[-1], f"{stem}.layers.{i}", config, bias, own))
    if pick is not None and last < 0:
        states.append(pick(states.pop()))
    return states


def attention_bias(graph: Graph, attention_mask: str) -> str:
    """Returns what is added to the scores, as `clipmb.pt.modeling.attention_bias`: (batch, 1, seq, seq)."""
    lowest, zero = graph.constant(np.finfo(graph.dtype).min), graph.constant(0)
    seq = graph.op("Squeeze", graph.size(attention_mask, 1))
    steps = graph.op("Range", graph.constant(0, np.int64), seq, graph.constant(1, np.int64))
    rows = graph.op("Unsqueeze", steps, graph.integers(1))
    later = graph.op("Less", rows, steps)
    causal = graph.op("Where", later, lowest, zero)  # (seq, seq)
    looked_at = graph.op("Equal", attention_mask, graph.constant(1, np.int64))
    padding = graph.op("Where", looked_at, zero, lowest)  # (batch, seq)
    return graph.op("Add", causal, graph.op("Unsqueeze", padding, graph.integers(1, 2)))


# ---- towers ----------------------------------------------------------------------------------------------------------


def text_embeddings(graph: Graph, input_ids: str, stem: str) -> str:
    """Token plus position embeddings: (batch, seq) to (batch, seq, width)."""
    tokens = graph.op("Gather", graph.parameter(f"{stem}.token_embedding.weight"), input_ids)
    table = graph.parameter(f"{stem}.position_embedding.weight")
    positions = graph.op("Slice", table, graph.integers(0), graph.size(input_ids, 1), graph.integers(0))
    return graph.op("Add", tokens, positions)


def vision_embeddings(graph: Graph, pixel_values: str, stem: str, config: CLIPVisionConfig) -> str:
    """Class token and patch embeddings plus position embeddings.

    (batch, channels, height, width) to (batch, patches + 1, width). Patches are multiplied as one matrix; an image of
    no whole number of patches loses the rest.
    """
    side, size, width = config.image_size // config.patch_size, config.patch_size, config.hidden_size
    if side * size != config.image_size:
        ends = graph.integers(side * size, side * size)
        pixel_values = graph.op("Slice", pixel_values, graph.integers(0, 0), ends, graph.integers(2, 3))
    patches = graph.op("Reshape", pixel_values, graph.integers(0, 0, side, size, side, size))
    patches = graph.op("Transpose", patches, perm=[0, 2, 4, 1, 3, 5])  # (batch, rows, columns, channels, size, size)
    patches = graph.op("Reshape", patches, graph.integers(0, side * side, config.num_channels * size * size))
    kernel = graph.parameter(f"{stem}.patch_embedding.weight", lambda array: array.reshape(width, -1).T)
    patches = graph.op("MatMul", patches, kernel)  # (batch, patches, width)
    shape = graph.op("Concat", graph.size(pixel_values, 0), graph.integers(1, width), axis=0)
    class_token = graph.op("Expand", graph.parameter(f"{stem}.class_embedding"), shape)  # (batch, 1, width)
    embeddings = graph.op("Concat", class_token, patches, axis=1)
    return graph.op("Add", embeddings, graph.parameter(f"{stem}.position_embedding.weight"))


def text_transformer(
    graph: Graph, input_ids: str, attention_mask: str, config: CLIPTextConfig, whole: bool
) -> tuple[list[str], str, str]:
    """The text tower over (batch, seq): the hidden states, the last of them normalised, and the pooled one.

    Unless the ``whole`` is asked for, the last block computes nothing but the pooled state.
    """
    stem = "text_model"
    pick = end_tokens(graph, input_ids, config.eos_token_id)
    hidden_states = text_embeddings(graph, input_ids, f"{stem}.embeddings")
    bias = attention_bias(graph, attention_mask)
    states = encoder(graph, hidden_states, f"{stem}.encoder", config, bias, None if whole else pick)
    last_hidden_state = layer_norm(graph, states[-1], f"{stem}.final_layer_norm", config)
    pooled = graph.op("Squeeze", pick(last_hidden_state) if whole else last_hidden_state, graph.integers(1))
    return states, last_hidden_state, pooled


def end_tokens(graph: Graph, input_ids: str, eos_token_id: int) -> Pick:
    """Returns what takes the row at the end token of each text: (batch, seq, …) to (batch, 1, …).

    Which token that is stands in `clipmb.pt.modeling.end_tokens`.
    """
    chosen = input_ids if eos_token_id == 2 else graph.op("Equal", input_ids, graph.constant(eos_token_id, np.int64))
    positions = graph.op("ArgMax", graph.cast(chosen, np.int32), axis=1, keepdims=1)  # (batch, 1)
    return lambda x: graph.op("Unsqueeze", graph.op("GatherND", x, positions, batch_dims=1), graph.integers(1))


def vision_transformer(
    graph: Graph, pixel_values: str, config: CLIPVisionConfig, whole: bool
) -> tuple[list[str], str, str]:
    """The vision tower over (batch, channels, height, width): the hidden states, the last of them, the pooled one.

    ``whole`` is that of `text_transformer`.
    """
    stem = "vision_model"
    hidden_states = vision_embeddings(graph, pixel_values, f"{stem}.embeddings", config)
    hidden_states = layer_norm(graph, hidden_states, f"{stem}.pre_layrnorm", config)
    states = encoder(graph, hidden_states, f"{stem}.encoder", config, None, None if whole else partial(_first, graph))
    first = graph.op("Squeeze", _first(graph, states[-1]) if whole else states[-1], graph.integers(1))
    return states, states[-1], layer_norm(graph, first, f"{stem}.post_layernorm", config)


def _first(graph: Graph, x: str) -> str:
    """Takes the class token: (batch, seq, width) to (batch, 1, width)."""
    return graph.op("Slice", x, graph.integers(0), graph.integers(1), graph.integers(1))


# ---- heads -----------------------------------------------------------------------------------------------------------


def normalize(graph: Graph, x: str) -> str:
    """Divides rows by their length: (batch, proj) to the same."""
    return graph.op("Div", x, graph.op("ReduceL2", x, graph.integers(-1), keepdims=1))


def clip(
    config: CLIPConfig,
    weights: Mapping[str, np.ndarray],
    tower: str = "both",
    *,
    dtype: str = "float32",
    quantised: bool = False,
    keep: Collection[str] = (),
    normalized: bool = False,
    hidden_states: bool = False,
    ids: str = "int64",
    length: int | None = None,
    names: Mapping[str, str | None] | None = None,
    preprocess: Callable[[Graph, str], str] | None = None,
) -> Graph:
    """Builds the graph of a model, or of one tower with its projection.

    Args:
        config: The model's config.
        weights: Canonical name to array, in canonical layout; "both" needs those of a `CLIPModel`.
        tower: "image" takes ``pixel_values`` (batch, channels, image_size, image_size) and returns ``image_embeds``
            (batch, proj); "text" takes ``input_ids`` and ``attention_mask``, (batch, seq) int64, and returns
            ``text_embeds``; "both" takes all of them, and also returns ``logits_per_image`` (images, texts) and
            ``logits_per_text`` (texts, images).
        dtype: As in `Graph`. Inputs and outputs are float32, or float64 where it is that.
        quantised: As in `Graph`.
        keep: As in `Graph`.
        normalized: Return embeddings of length 1, which those of "both" always are, as in transformers.
        hidden_states: Also return, for each tower, what `clipmb.common.outputs.stages` lists, under those names;
            ``….projected`` is the embedding before its length is made 1.
        ids: "int64" or "int32": the dtype of ``input_ids`` and ``attention_mask``.
        length: What seq is; any when None.
        names: What inputs and outputs with other names are called; with None for ``attention_mask`` there is no such
            input, and every token counts.
        preprocess: Makes ``pixel_values`` of ``images``, (batch, height, width, 3) uint8 of any size, which are then
            the input.

    Raises:
        ValueError: There is no such tower, or pictures cannot be preprocessed so.
        KeyError: A weight is missing.
    """
    if tower not in TOWERS:
        raise one_of("tower", tower, TOWERS)
    graph = Graph(weights, dtype, quantised, keep, names)
    wide = np.promote_types(graph.dtype, np.float32)
    both = tower == "both"
    proj, embeds = config.projection_dim, {}
    if tower != "image":
        batch = "text_batch" if both else "batch"
        shape = [batch, length or "seq"]
        input_ids = graph.input("input_ids", ids, shape)
        if graph.names.get("attention_mask", "") is None:
            one = numpy_helper.from_array(np.ones(1, ids))
            attention_mask = graph.op("ConstantOfShape", graph.op("Shape", input_ids), value=one)
        else:
            attention_mask = graph.input("attention_mask", ids, shape)
        if ids != "int64":
            input_ids, attention_mask = (graph.cast(value, np.int64) for value in (input_ids, attention_mask))
        parts = text_transformer(graph, input_ids, attention_mask, config.text_config, hidden_states)
        embeds["text"] = _projected(graph, "text", "text_projection", parts, config, batch, hidden_states)
    if tower != "text":
        batch = "image_batch" if both else "batch"
        channels, side = config.vision_config.num_channels, config.vision_config.image_size
        if preprocess is None:
            pixel_values = graph.input("pixel_values", wide, [batch, channels, side, side])
        else:
            pixel_values = preprocess(graph, graph.input("images", np.uint8, [batch, "height", "width", channels]))
        if wide != graph.dtype:
            pixel_values = graph.cast(pixel_values, graph.dtype)
        parts = vision_transformer(graph, pixel_values, config.vision_config, hidden_states)
        embeds["image"] = _projected(graph, "vision", "visual_projection", parts, config, batch, hidden_states)
    if both or normalized:
        embeds = {name: normalize(graph, value) for name, value in embeds.items()}
    if both:
        scale = graph.op("Exp", graph.parameter("logit_scale"))
        texts = graph.op("Mul", embeds["text"], scale)
        logits = graph.op("MatMul", texts, graph.op("Transpose", embeds["image"], perm=[1, 0]))
        graph.output("logits_per_image", graph.op("Transpose", logits, perm=[1, 0]), ["image_batch", "text_batch"])
        graph.output("logits_per_text", logits, ["text_batch", "image_batch"])
    for name, value in embeds.items():
        graph.output(f"{name}_embeds", value, [f"{name}_batch" if both else "batch", proj])
    return graph


def _projected(
    graph: Graph,
    tower: str,
    stem: str,
    parts: tuple[list[str], str, str],
    config: CLIPConfig,
    batch: str,
    hidden_states: bool,
) -> str:
    """Projects the pooled state of a tower, (batch, proj), and declares what is made on the way."""
    states, last_hidden_state, pooled = parts
    projected = linear(graph, pooled, stem, bias=False)
    if hidden_states:
        part = config.text_config if tower == "text" else config.vision_config
        seq = "seq" if tower == "text" else config.vision_config.num_patches + 1
        for i, state in enumerate(states):
            name = f"{tower}.block.{i - 1}" if i else f"{tower}.embeddings"
            graph.output(name, state, [batch, seq, part.hidden_size])
        graph.output(f"{tower}.last_hidden_state", last_hidden_state, [batch, seq, part.hidden_size])
        graph.output(f"{tower}.pooled", pooled, [batch, part.hidden_size])
        graph.output(f"{tower}.projected", projected, [batch, config.projection_dim])
    return projected
