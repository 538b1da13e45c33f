"""Headers: those that the safetensors package takes are taken, and no others."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_engine.errors import WeightsError
from llava_engine.network import safetensors_file
from llava_engine.network.safetensors_file import SafetensorsFile, narrowed_bytes

DATA = bytes(range(48))
GOOD: dict[str, Any] = {
    "one": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "two": {"dtype": "BF16", "shape": [8], "data_offsets": [32, 48]},
}
"""A header for DATA."""


def write(path: Path, header: object, data: bytes = DATA) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def package_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def refused(path: Path, said: str = "corrupt") -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightsError, match=said) as raised:
        SafetensorsFile(path)
    assert path.name in str(raised.value) and str(path.parent) not in str(raised.value)
    assert len(os.listdir("/proc/self/fd")) == before


def changed(name: str, **fields: object) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "none": torch.empty(0, 7),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "whole": torch.arange(4),
        "bits": torch.tensor([True, False]),
        "eighth": torch.randn(9).to(torch.float8_e4m3fn),
        "größe": torch.randn(1, 1, 2).bfloat16(),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.tensors.keys() == tensors.keys()
        for name, stored in file.tensors.items():
            content = bytearray(stored.nbytes)
            file.read(memoryview(content), stored.offset)
            assert stored.shape == tuple(tensors[name].shape)
            assert bytes(content) == bytes(tensors[name].view(-1).view(torch.uint8).tolist())


BROKEN = {
    "overlap": changed("two", data_offsets=[16, 32]),
    "gap": {"two": GOOD["two"]},
    "too-short": changed("two", shape=[7], data_offsets=[32, 46]),
    "too-long": changed("two", shape=[9], data_offsets=[32, 50]),
    "far-out": changed("two", data_offsets=[1 << 62, (1 << 62) + 16]),
    "backwards": changed("one", data_offsets=[32, 0]),
    "negative": changed("one", data_offsets=[-32, 0]),
    "fraction": changed("one", data_offsets=[0, 32.0]),
    "bool": changed("one", shape=[True, 8]),
    "one-offset": changed("one", data_offsets=[32]),
    "three-offsets": changed("one", data_offsets=[0, 32, 48]),
    "no-offsets": changed("one", data_offsets=None),
    "other-type": changed("one", dtype="F16"),
    "unknown-type": changed("one", dtype="F31"),
    "type-is-none": changed("one", dtype=None),
    "type-is-list": changed("one", dtype=["F32"]),
    "other-shape": changed("one", shape=[2, 5]),
    "negative-shape": changed("one", shape=[-2, -4]),
    "shape-is-text": changed("one", shape="24"),
    "shape-is-huge": changed("one", shape=[1 << 63, 1 << 63]),
    "no-dtype": {**GOOD, "one": {"shape": [2, 4], "data_offsets": [0, 32]}},
    "tensor-is-list": {**GOOD, "one": [0, 32]},
    "metadata-is-text": {**GOOD, "__metadata__": "pt"},
    "metadata-is-nested": {**GOOD, "__metadata__": {"format": {"a": "b"}}},
    "surrogate": {**GOOD, "\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    "list": [GOOD],
    "nothing": b"",
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "not-utf-8": json.dumps(GOOD).encode().replace(b"one", b"\xff\xfe\xfd"),
    "cut": json.dumps(GOOD).encode()[:-1],
    "nan": json.dumps(GOOD).encode().replace(b"48]", b"NaN]"),
    "deep": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_a_broken_header(header: object, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", header)
    assert not package_takes(path)
    refused(path, "corrupt")


def test_what_the_package_lets_pass(tmp_path: Path) -> None:
    """A name twice, of which one would have to be chosen; a field that nothing explains; a header
    that does not begin as the format has it."""
    path = tmp_path / "a.safetensors"
    text = json.dumps(GOOD)
    refused(write(path, b" " + text.encode()), "no JSON object")
    refused(write(path, text.replace('"two"', '"one"').encode()), "twice")
    refused(write(path, changed("one", strides=[1, 2])), "tensor one")


def test_a_header_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(GOOD).encode()
    path = write(tmp_path / "a.safetensors", text)
    monkeypatch.setattr(safetensors_file, "HEADER_LIMIT", len(text))
    SafetensorsFile(path).close()
    monkeypatch.setattr(safetensors_file, "HEADER_LIMIT", len(text) - 1)
    refused(path, f"header of {len(text)} bytes")


def test_padding_behind_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", json.dumps(GOOD).encode() + b"   ")
    with SafetensorsFile(path) as file:
        content = bytearray(32)
        file.read(memoryview(content), file.tensors["one"].offset)
    assert content == DATA[:32]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, "one less", "one more"])
def test_a_file_that_is_too_short_or_too_long(size: int | str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", GOOD)
    if isinstance(size, str):
        size = path.stat().st_size + {"one less": -1, "one more": 1}[size]
    os.truncate(path, size)
    assert not package_takes(path)
    refused(path)


BOUNDS = [0, 8, 16, 24, 32, 40, 48]
FIELDS = {
    "dtype": ["F64", "F32", "F16", "BF16", "U8", "I64", "C64", "F4", "F8_E8M0", "F6_E2M3"],
    "shape": [[], [0], [1], [2], [4], [8], [16], [2, 4], [4, 1, 1], [0, 8], [3], [5, 16]],
    "data_offsets": [[begin, end] for begin in BOUNDS for end in [*BOUNDS, 56]],
}
CHANGES = st.one_of(
    *(
        st.tuples(st.sampled_from("abcd"), st.just(field), st.sampled_from(values))
        for field, values in FIELDS.items()
    )
)
LAID_OUT: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F64", "shape": [1], "data_offsets": [16, 24]},
    "c": {"dtype": "F16", "shape": [0], "data_offsets": [24, 24]},
    "d": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [24, 48]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@given(st.lists(CHANGES, max_size=3))
def test_the_package_says_the_same(folder: Path, changes: list[tuple[str, str, object]]) -> None:
    header = LAID_OUT
    for name, field, value in changes:
        header = {**header, name: {**header[name], field: value}}
    path = write(folder / "a.safetensors", header)
    if not package_takes(path):
        refused(path)
        return
    with SafetensorsFile(path) as file, safe_open(path, framework="pt") as theirs:
        assert file.tensors.keys() == set(theirs.keys())
        for name, stored in file.tensors.items():
            assert list(stored.shape) == theirs.get_slice(name).get_shape()
            assert stored.dtype == theirs.get_slice(name).get_dtype()


def test_wide_floats_count_as_16_bits_and_broken_files_as_they_are(tmp_path: Path) -> None:
    wide = {"a": torch.ones(3, 5), "b": torch.ones(7).double(), "empty": torch.ones(0, 2)}
    kept = {"c": torch.ones(9).half(), "d": torch.ones(4).bfloat16(), "e": torch.ones(6).int()}
    save_file({**wide, **kept}, tmp_path / "model-1.safetensors")
    save_file({"f": torch.ones(11)}, tmp_path / "model-2.safetensors")
    write(tmp_path / "broken.safetensors", changed("one", data_offsets=[0, 1 << 40]))
    (tmp_path / "other.bin").write_bytes((tmp_path / "model-1.safetensors").read_bytes())
    assert narrowed_bytes(tmp_path) == 2 * 15 + 6 * 7 + 2 * 11
