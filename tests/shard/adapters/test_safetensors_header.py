from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.shard.adapters.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, read_header
from loraplex.shard.errors import AdapterRejected

from .layouts import raw_safetensors, toy_tensors, weights_bytes


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def refusal(file: bytes) -> str:
    with pytest.raises(AdapterRejected) as refused:
        read_header(memoryview(file))
    return str(refused.value)


def test_reads_what_safetensors_writes() -> None:
    tensors = toy_tensors()
    file = weights_bytes(tensors)
    header = read_header(memoryview(file))
    assert header.keys() == tensors.keys()
    for key, tensor in tensors.items():
        info = header[key]
        assert (info.dtype, info.shape) == ("F32", tensor.shape)
        assert file[info.begin : info.end] == tensor.tobytes()


def test_reads_metadata_and_padding() -> None:
    header = (
        b'{"__metadata__": {"format": "pt"}, "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}   '
    )
    assert list(read_header(memoryview(raw_safetensors(header, b"ab")))) == ["a"]


@pytest.mark.parametrize(
    ("file", "word"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        (raw_safetensors({}, length=MAX_HEADER_BYTES + 1), "header claims"),
        (raw_safetensors({}, length=2**63), "header claims"),
        (raw_safetensors({}, length=100), "cut short"),
        (raw_safetensors(b"{"), "not JSON"),
        (raw_safetensors(b"\xff\xfe{}"), "not JSON"),
        (raw_safetensors(b"[" * 200_000), "not JSON"),
        (raw_safetensors(b'{"a": ' * 100_000), "not JSON"),
        (raw_safetensors([]), "not a JSON object"),
        (raw_safetensors(b'{"a": 1' + b"0" * 5000 + b"}"), "not JSON"),
        (raw_safetensors({"a": 3}), "dtype, shape and data_offsets"),
        (raw_safetensors({"a": {**entry(0, 4), "more": 1}}, b"1234"), "dtype, shape and data_offsets"),
        (raw_safetensors({"a": entry(0, 4, "I32")}, b"1234"), "a: dtype I32"),
        (raw_safetensors({"a": entry(0, 4, "F8_E4M3", [4])}, b"1234"), "a: dtype F8_E4M3"),
        (raw_safetensors({"a": entry(0, 4, "BOOL", [4])}, b"1234"), "a: dtype BOOL"),
        (raw_safetensors({"a": entry(0, 4, ["F32"])}, b"1234"), "a: dtype"),
        (raw_safetensors({"a": entry(0, 4, shape=[-1])}, b"1234"), "shape"),
        (raw_safetensors({"a": entry(0, 4, shape=[True])}, b"1234"), "shape"),
        (raw_safetensors({"a": entry(0, 4, shape=[1] * 9)}, b"1234"), "shape"),
        (raw_safetensors({"a": entry(0, 4, shape=[2**62, 4])}, b"1234"), "does not fill"),
        (raw_safetensors({"a": entry(0, 4, shape=[2])}, b"1234"), "does not fill"),
        (raw_safetensors({"a": entry(4, 0, shape=[1])}, b"1234"), "does not fill"),
        (
            raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
            "data_offsets",
        ),
        (raw_safetensors({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "b: its data overlaps"),
        (raw_safetensors({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), "b: its data leaves a gap"),
        (raw_safetensors({"a": entry(0, 8)}, b"x" * 4), "cut short"),
        (raw_safetensors({"a": entry(0, 8)}, b"x" * 12), "belong to no tensor"),
    ],
)
def test_refuses(file: bytes, word: str) -> None:
    assert word in refusal(file)


def test_refuses_a_key_named_twice() -> None:
    one = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    assert "'a' twice" in refusal(raw_safetensors(b"{" + one + b", " + one + b"}", b"1234"))


def test_refuses_too_many_tensors() -> None:
    tensors = {str(index): entry(0, 0) for index in range(MAX_TENSORS + 1)}
    assert f"{MAX_TENSORS + 1} tensors" in refusal(raw_safetensors(tensors))


def test_a_million_tensors_are_refused_before_they_are_read() -> None:
    one = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    file = raw_safetensors(b"{" + b",".join(one % index for index in range(1_000_000)) + b"}")
    assert "header claims" in refusal(file)


def header_or_refusal(file: bytes) -> dict[str, TensorInfo] | AdapterRejected:
    try:
        return read_header(memoryview(file))
    except AdapterRejected as refused:
        return refused


@given(st.binary(max_size=200), st.integers(0, 250))
def test_any_bytes_are_read_or_refused(junk: bytes, length: int) -> None:
    assert isinstance(header_or_refusal(raw_safetensors(junk, length=length)), dict | AdapterRejected)


@given(st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    file = bytearray(weights_bytes(toy_tensors()))
    file[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    header = header_or_refusal(bytes(file[:cut]))
    if cut < len(file):
        # What is left can tile the file only if the damage hit a tensor's size.
        assert isinstance(header, AdapterRejected) or all(info.end <= cut for info in header.values())
    else:
        assert isinstance(header, dict | AdapterRejected)
