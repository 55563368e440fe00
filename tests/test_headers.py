import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ziplora.errors import FormatError
from ziplora.headers import Limits, TensorInfo, few, read_header, read_header_bytes, read_header_file, shown

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: object, n_values: int = 8, text: bytes | None = None) -> bytes:
    text = text if text is not None else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(n_values)


def test_reads_what_safetensors_wrote(tmp_path):
    content = save({"b": torch.zeros(2, 3, dtype=torch.float16), "a": torch.ones(4)}, {"format": "pt", "x": "ü"})
    (tmp_path / "x.safetensors").write_bytes(content)
    for header in (read_header_bytes(content, "x"), read_header_file(tmp_path / "x.safetensors")):
        assert header.tensors["b"].shape == (2, 3)
        assert header.tensors["b"].dtype == "F16"
        assert header.metadata == {"format": "pt", "x": "ü"}
        assert header.n_bytes == len(content)
        a = header.tensors["a"]
        assert content[header.data_start + a.start : header.data_start + a.stop] == torch.ones(4).numpy().tobytes()


def test_needs_two_small_reads_of_a_large_file():
    content, calls = save({"a": torch.zeros(1000, 1000)}), []

    def read(start, stop):
        calls.append(stop - start)
        return content[start:stop]

    assert read_header(read, len(content), "x").tensors["a"] == TensorInfo("F32", (1000, 1000), 0, 4_000_000)
    assert len(calls) == 2
    assert sum(calls) < 300


whole = save({"a": torch.ones(4)})
BAD_FILES = {
    "empty": (b"", "x is empty: 0 bytes; was the upload or download cut short?"),
    "a few bytes": (b"abc", "x is no safetensors file"),
    "cut in the header": (whole[:20], "x is truncated: its header alone takes"),
    "cut in the values": (whole[:-4], "x is truncated: its header describes 16 bytes of values, the file holds 12"),
    "bytes behind": (whole + b"12", "x has 2 bytes behind its last tensor"),
    "zip checkpoint": (
        b"PK\x03\x04" + bytes(100),
        "x is a zip archive, as PyTorch's .ckpt, .pt and .bin files are; only",
    ),
    "pickle": (
        pickle.dumps({"a": list(range(100))}, 2),
        "x is a Python pickle, as old PyTorch .ckpt and .pt files are;",
    ),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
        "x is a Git LFS pointer instead of the file",
    ),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "x is a web page instead of the file itself"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "x is a PNG image; a LoRA in the safetensors format is expected"),
    "no JSON": (file_of(None, text=b"{nonsense"), "x has a header that is no JSON"),
    "not UTF-8": (file_of(None, text=b'{"\xff": 1}'), "x has a header that is no JSON"),
    "nested JSON": (file_of(None, text=b'{"a":' + b"[" * 100_000), "x has a header that is no JSON"),
    "a huge number": (file_of(None, text=b'{"a":' + b"9" * 9999 + b"}"), "x has a header that is no JSON"),
    "doubled name": (
        file_of(None, text=b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2)),
        "x names 'a' twice in its header",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "a": F32}), "x has a __metadata__ entry that is no map"),
    "no description": (file_of({"a": 3}), "tensor a is not described by dtype, shape and data_offsets"),
    "more in it": (file_of({"a": F32 | {"x": 1}}), "tensor a is not described by"),
    "negative shape": (file_of({"a": F32 | {"shape": [-2]}}), "tensor a has an impossible shape"),
    "true as a shape": (file_of({"a": F32 | {"shape": [True]}}), "tensor a has an impossible shape"),
    "backward offsets": (
        file_of({"a": F32 | {"data_offsets": [8, 0]}}),
        "tensor a of shape [2] and dtype F32 cannot lie in",
    ),
    "dtype": (file_of({"a": F32 | {"dtype": "F4"}}), "tensor a has the unknown dtype F4"),
    "size lies": (
        file_of({"a": F32 | {"shape": [2**20]}}),
        "tensor a of shape [1048576] and dtype F32 cannot lie in 8 bytes",
    ),
    "overlap": (
        file_of({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, 12),
        "tensor b overlaps the tensor before it",
    ),
    "the same place": (file_of({"a": F32, "b": F32}), "tensor b overlaps the tensor before it"),
    "hole": (file_of({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, 20), "tensor b leaves a hole before it"),
    "control characters": (file_of({"a\x1b[31m": F32}), "has a tensor whose name is no sensible text: 'a\\x1b[31m'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses(case, tmp_path):
    content, message = BAD_FILES[case]
    with pytest.raises(FormatError) as refusal:
        read_header_bytes(content, "x")
    assert message in str(refusal.value)
    assert str(refusal.value).isprintable()
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FormatError):
        read_header_file(tmp_path / "x")


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(FormatError, match=r"is a directory: name the \.safetensors file in it"):
        read_header_file(tmp_path)
    with pytest.raises(FormatError, match=r"no\.safetensors cannot be read: No such file or directory"):
        read_header_file(tmp_path / "no.safetensors")


def test_limits_hold_before_anything_is_read():
    def never(start, stop):
        raise AssertionError((start, stop))

    with pytest.raises(FormatError, match="x has 9,000,000,000 bytes, more than the limit of 8,589,934,592: is"):
        read_header(never, 9_000_000_000, "x")

    def only_the_opening(start, stop):
        assert stop <= 64
        return (2**27).to_bytes(8, "little") + b"{" + bytes(stop - 9)

    with pytest.raises(FormatError, match="x has a header of 134,217,728 bytes; the limit is 33,554,432"):
        read_header(only_the_opening, 2**30, "x")
    with pytest.raises(FormatError, match="x has 3 tensors; the limit is 2: is it a LoRA"):
        read_header_bytes(save({name: torch.ones(1) for name in "abc"}), "x", Limits(max_tensors=2))


def test_a_source_that_gives_less_than_it_said():
    with pytest.raises(FormatError, match="x gave 32 of the 56 bytes of its header"):
        read_header(lambda start, stop: whole[start:stop] if start == 0 else whole[8:40], len(whole), "x")


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(whole) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(whole)))
def test_damage_is_refused_or_harmless_never_a_crash(position, byte, cut):
    damaged = bytearray(whole)
    damaged[position] = byte
    for content in (bytes(damaged), bytes(damaged[:cut])):
        try:
            header = read_header_bytes(content, "x")
        except FormatError:
            continue
        assert all(tensor.stop <= len(content) - header.data_start for tensor in header.tensors.values())


def test_names_in_messages_are_short_and_on_one_line():
    assert shown("a\nb\x1b[0m" + "c" * 500) == "a b [0m" + "c" * 112 + "…"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert few(["a", "b"]) == "a, b"
