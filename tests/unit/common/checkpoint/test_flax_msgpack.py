"""flax_model.msgpack: layout, round trips, damage and hostile files. Flax itself is in tests/reference."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, assert_same
from format_cases import arrays_of, heads_and_configs, read_as, write_as, written
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmb import CheckpointError
from clipmb.common.checkpoint import flax_msgpack, formats
from clipmb.common.checkpoint.flax_msgpack import read_tree
from clipmb.common.hub import Source

CONFIG = CONFIGS["plain"]
FORMAT = "flax-msgpack"


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("head", ALL_HEADS)
def test_round_trip(tmp_path, head, dtype, size):
    part, arrays = written(FORMAT, tmp_path, head, dtype, size)
    assert_same(read_as(FORMAT, tmp_path, part, head), arrays)
    assert (tmp_path / "flax_model.msgpack.index.json").exists() == (size == "20KB")


@settings(max_examples=30, deadline=None)
@given(
    case=heads_and_configs(ALL_HEADS),
    size=st.integers(1, 20_000),
    chunk=st.integers(1, 500),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_round_trip_of_random_configurations(tmp_path_factory, case, size, chunk, dtype):
    head, part = case
    folder = tmp_path_factory.mktemp("msgpack")
    arrays = arrays_of(part, head, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax_msgpack, "CHUNK", chunk)
        files = write_as(FORMAT, folder, arrays, part, head, size)
    assert sorted(files) == sorted(os.listdir(folder))
    assert_same(read_as(FORMAT, folder, part, head), arrays)


def test_arrays_are_mapped_and_the_file_never_changes(tmp_path):
    """An array at an odd place is copied, since frameworks need aligned ones; bytes never are."""
    _, arrays = written(FORMAT, tmp_path)
    before = (tmp_path / "flax_model.msgpack").read_bytes()
    tensors = formats.load(Source(str(tmp_path))).tensors
    mapped = 0
    for name in tensors:
        array = tensors[name]
        assert array.flags.aligned
        array[...] = 0
        mapped += not array.flags.owndata
    assert mapped > len(arrays) // 8
    assert (tmp_path / "flax_model.msgpack").read_bytes() == before


def test_nothing_is_read_until_it_is_asked_for(tmp_path):
    big = np.zeros(1 << 22, np.float32)
    (tmp_path / "x.msgpack").write_bytes(tree({"a": array_of(big), "b": array_of(big)}))
    tracemalloc.start()
    try:
        tensors = read_tree(tmp_path / "x.msgpack")
        assert {name: tensor.nbytes for name, tensor in tensors.items()} == {"a": big.nbytes, "b": big.nbytes}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_any_name_and_a_level_called_params(tmp_path):
    part, arrays = written(FORMAT, tmp_path)
    content = (tmp_path / "flax_model.msgpack").read_bytes()
    (tmp_path / "mine.msgpack").write_bytes(b"\x81" + text("params") + content)
    assert_same(read_as(FORMAT, tmp_path / "mine.msgpack", part, "CLIPModel"), arrays)


def test_no_variant_is_claimed(tmp_path):
    written(FORMAT, tmp_path)
    with pytest.raises(CheckpointError, match="variant 'fp16'"):
        formats.load(Source(str(tmp_path)), "fp16")


# -- the encoding, byte by byte ---------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return bytes([0xA0 | len(value)]) + value.encode()


def array_of(array: np.ndarray, code: int = 1) -> bytes:
    """As flax.serialization writes it, with the lengths of the widest form."""
    inside = b"\x93" + bytes([0x90 | array.ndim]) + b"".join(struct.pack(">BI", 0xCE, size) for size in array.shape)
    inside += text(array.dtype.name) + struct.pack(">BI", 0xC6, array.nbytes) + array.tobytes()
    return struct.pack(">BIb", 0xC9, len(inside), code) + inside


def tree(entries: dict[str, bytes]) -> bytes:
    return bytes([0x80 | len(entries)]) + b"".join(text(name) + value for name, value in entries.items())


ONE = np.arange(6, dtype=np.float32)


def made(path: Path, content: bytes) -> dict[str, np.ndarray]:
    path = path / "x.msgpack"
    path.write_bytes(content)
    return {name: tensor.make() for name, tensor in read_tree(path).items()}


def test_every_leaf_of_flax_is_read(tmp_path):
    half = ONE.astype(ml_dtypes.bfloat16)
    parts = tree({"0": array_of(ONE[:4]), "1": array_of(ONE[4:])})
    found = made(
        tmp_path,
        tree(
            {
                "a": tree({"b": array_of(ONE.reshape(2, 3))}),
                "scalar": array_of(np.asarray(np.float32(2.5)), code=3),
                "half": array_of(half),
                "complex": struct.pack(">BBbBBdBd", 0xC7, 19, 2, 0x92, 0xCB, 1.0, 0xCB, -2.0),
                "divided": tree(
                    {"__msgpack_chunked_array__": b"\xc3", "shape": tree({"0": b"\x03", "1": b"\x02"}), "chunks": parts}
                ),
            }
        ),
    )
    assert (found["a/b"] == ONE.reshape(2, 3)).all()
    assert found["scalar"] == 2.5
    assert found["scalar"].shape == ()
    assert found["half"].dtype == half.dtype
    assert found["half"].tobytes() == half.tobytes()
    assert found["complex"] == 1 - 2j
    assert (found["divided"] == ONE.reshape(3, 2)).all()


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])
def test_every_dtype(tmp_path, name):
    array = np.array([[0, 1, 1]], name)
    found = made(tmp_path, tree({"a": array_of(array)}))["a"]
    assert found.dtype == array.dtype
    assert (found == array).all()


GOOD = array_of(ONE)
HUGE = struct.pack(">I", 2**32 - 1)


def claim(shape: tuple[int, ...], dtype: str = "float32", data: bytes = bytes(24)) -> bytes:
    inside = b"\x93" + bytes([0x90 | len(shape)]) + b"".join(struct.pack(">BQ", 0xCF, size) for size in shape)
    inside += text(dtype) + b"\xc4" + bytes([len(data)]) + data
    return b"\xc7" + bytes([len(inside)]) + b"\x01" + inside


HOSTILE = {
    "nothing": b"",
    "a list": b"\x91" + GOOD,
    "only an array": GOOD,
    "a number": b"\x07",
    "more after the end": tree({"a": GOOD}) + b"\xc0",
    "a key twice": b"\x82" + 2 * (text("a") + GOOD),
    "a name twice": b"\x82" + text("a/b") + GOOD + text("a") + tree({"b": GOOD}),
    "a number as key": b"\x81\x01" + GOOD,
    "a long key": b"\x81\xda\xff\xff" + b"a" * 65535 + GOOD,
    "a key that is no text": b"\x81\xa2\xff\xfe" + GOOD,
    "a number as value": tree({"a": b"\x01"}),
    "text as value": tree({"a": text("b")}),
    "a list as value": tree({"a": b"\x91" + GOOD}),
    "nil as value": tree({"a": b"\xc0"}),
    "the unused byte": tree({"a": b"\xc1"}),
    "a map of 4 billion": b"\xdf" + HUGE,
    "a map of 4 billion of the smallest entries": b"\xdf" + HUGE + b"\xa0\x80" * 10,
    "a text of 4 GB": b"\x81\xdb" + HUGE,
    "an extension of 4 GB": b"\x81" + text("a") + b"\xc9" + HUGE + b"\x01",
    "an unknown extension": tree({"a": b"\xc7\x01\x05\x00"}),
    "a fixed extension": tree({"a": b"\xd4\x01\x00"}),
    "an extension that is too short": tree({"a": b"\xc7" + bytes([GOOD[4] - 1]) + GOOD[5:]}),
    "an extension that is too long": tree({"a": b"\xc7" + bytes([GOOD[4] + 1]) + GOOD[5:] + b"\0"}),
    "exabytes": tree({"a": claim((2**60,))}),
    "a product that wraps to the right size": tree({"a": claim((2**32, 2**32, 6))}),
    "no elements": tree({"a": claim((0, 2**63), data=b"")}),
    "a wrong size": tree({"a": claim((7,))}),
    "objects": tree({"a": claim((3,), "object")}),
    "a structure": tree({"a": claim((3,), "f4,f4")}),
    "16 axes": tree({"a": b"\xc7\x05\x01\x93\xdc\x00\x10\x01"}),
    "a negative axis": tree({"a": b"\xc7\x05\x01\x93\x91\xff\xa0\xc4"}),
    "no complex number": tree({"a": b"\xc7\x03\x02\x92\x01\x02"}),
    "nesting": (b"\x81" + text("a")) * 5000 + GOOD,
    "a divided array without parts": tree(
        {"a": tree({"__msgpack_chunked_array__": b"\xc3", "shape": tree({"0": b"\x00"}), "chunks": b"\x80"})}
    ),
    "a divided array without its shape": tree(
        {"a": tree({"__msgpack_chunked_array__": b"\xc3", "chunks": tree({"0": GOOD})})}
    ),
    "a divided array whose shape is another": tree(
        {"a": tree({"__msgpack_chunked_array__": b"\xc3", "shape": tree({"0": b"\x07"}), "chunks": tree({"0": GOOD})})}
    ),
    "a divided array of maps": tree(
        {
            "a": tree(
                {"__msgpack_chunked_array__": b"\xc3", "shape": tree({"0": b"\x06"}), "chunks": tree({"0": b"\x80"})}
            )
        }
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_before_memory_is_taken(tmp_path, content):
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
            formats.load(Source(str(tmp_path)))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_millions_of_values_are_refused_after_the_first_200_000(tmp_path):
    entries = b"".join(b"\xa5%05x\x80" % i for i in range(1 << 20))
    (tmp_path / "flax_model.msgpack").write_bytes(b"\xdf" + struct.pack(">I", 1 << 20) + entries)
    with pytest.raises(CheckpointError, match="more than 200000 values"):
        formats.load(Source(str(tmp_path)))


def test_truncation_anywhere_is_a_checkpoint_error(tmp_path):
    part, _ = written(FORMAT, tmp_path)
    path = tmp_path / "flax_model.msgpack"
    content = path.read_bytes()
    for size in [*range(200), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
            read_as(FORMAT, tmp_path, part, "CLIPModel")


def test_flipped_bits_outside_of_values_never_give_other_weights(tmp_path):
    """A flip is a CheckpointError, or harmless: it makes a scalar of an array, whose bytes are the same."""
    part, arrays = written(FORMAT, tmp_path, "CLIPTextModelWithProjection")
    path = tmp_path / "flax_model.msgpack"
    content = path.read_bytes()
    values = np.zeros(len(content), bool)
    for tensor in read_tree(path).values():
        start = content.index(tensor.make().tobytes())
        values[start : start + tensor.nbytes] = True
    structure = np.flatnonzero(~values)
    assert len(structure) < len(content) // 4
    refused = 0
    for position in np.random.default_rng(0).choice(structure, 400):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(position % 8)
        path.write_bytes(flipped)
        try:
            assert_same(read_as(FORMAT, tmp_path, part, "CLIPTextModelWithProjection"), arrays)
        except CheckpointError:
            refused += 1
    assert refused > 380


def test_two_tensors_for_one_parameter(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    scale = array_of(np.asarray(np.float32(1)))
    path.write_bytes(tree({"logit_scale": scale, "params": tree({"logit_scale": scale})}))
    with pytest.raises(CheckpointError, match="two tensors"):
        formats.load(Source(str(tmp_path)))


def test_missing_shards_and_escapes(tmp_path):
    written(FORMAT, tmp_path, size="20KB")
    shards = sorted(tmp_path.glob("flax_model-*"))
    shards[1].unlink()
    with pytest.raises(CheckpointError) as caught:
        formats.load(Source(str(tmp_path)))
    assert caught.value.problems == [shards[1].name]
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": {"a": "../x.msgpack"}}))
    with pytest.raises(CheckpointError, match="outside"):
        formats.load(Source(str(tmp_path)))
