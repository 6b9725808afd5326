"""The readers of other programs' weight files: against torch's and h5py's reading, and on damaged files."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from efficap.errors import InputError
from efficap.models.pretrained.hdf5 import read_hdf5
from efficap.models.pretrained.tf_checkpoint import _masked_crc32c, _varint, read_tf_checkpoint

MAGIC = 0xDB4775248B80FB57


# A TensorFlow checkpoint, written by hand


def varint(number: int) -> bytes:
    parts = []
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(dtype: int, shape: tuple[int, ...], offset: int, size: int, shard: int = 0) -> bytes:
    dims = b"".join(field(2, field(1, length)) for length in shape)
    return field(1, dtype) + field(2, dims) + field(3, shard) + field(4, offset) + field(5, size)


def block(items: list[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    content = b"".join(
        varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in items
    )
    content += (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes([compression])
    return content + _masked_crc32c(content).to_bytes(4, "little")


def write_checkpoint(
    prefix: Path, entries: dict[str, bytes], data: bytes, header: bytes = field(1, 1), compression: int = 0
) -> Path:
    items = [(b"", header), *((name.encode(), value) for name, value in sorted(entries.items()))]
    first = block(items, compression)
    index = block([(b"~", varint(0) + varint(len(first) - 5))])
    footer = varint(0) + varint(0) + varint(len(first)) + varint(len(index) - 5)
    footer = footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")
    prefix.with_name(f"{prefix.name}.index").write_bytes(first + index + footer)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    return prefix


def test_the_checksum_is_castagnolis() -> None:
    crc = 0xE3069283  # of "123456789", as RFC 3720 and every list of checksums has it
    assert _masked_crc32c(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_read_as_they_are_written(number: int) -> None:
    assert _varint(b"?" + varint(number), 1) == (number, 1 + len(varint(number)))


def test_openais_checkpoint_holds_what_transformers_saved(shared: Callable[[str], Path]) -> None:
    folder = shared("parity") / "gpt2_tiny"
    ours, theirs = (
        read_tf_checkpoint(folder / "openai/model.ckpt"),
        load_file(folder / "hf_safetensors/model.safetensors"),
    )
    for name, other in (("wte", "wte.weight"), ("h0/attn/c_attn/w", "h.0.attn.c_attn.weight")):
        found = ours[f"model/{name}"]
        expected = theirs[f"transformer.{other}"]
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    assert len(ours) == 4 + 2 * 12


def test_an_object_based_checkpoint_holds_what_keras_saved(shared: Callable[[str], Path]) -> None:
    folder = shared("parity") / "original_tiny"
    ours = read_tf_checkpoint(folder / "tf_checkpoint/decoder")
    theirs = read_hdf5(folder / "decoder.h5")
    for name in ("wte", "wpe", "wsp"):
        np.testing.assert_array_equal(
            ours[f"{name}/.ATTRIBUTES/VARIABLE_VALUE"], theirs[f"top_level_model_weights/{name}:0"]
        )
    assert sorted(a.tobytes() for a in ours.values()) == sorted(a.tobytes() for a in theirs.values())


def test_types_are_kept_and_bfloat16_is_widened_and_strings_are_left_out(tmp_path: Path) -> None:
    halves, singles = np.array([0.5, -2], "<f2"), np.array([[1.5, -3]], "<f4")
    brain = (singles.view("<u4") >> 16).astype("<u2")
    data = b"?" + halves.tobytes() + brain.tobytes() + singles.tobytes()  # nothing aligned
    entries = {
        "half": entry(19, (2,), 1, 4),
        "brain": entry(14, (1, 2), 5, 4),
        "single": entry(1, (1, 2), 9, 8),
        "text": entry(7, (), 0, 1),
        "scalar": entry(4, (), 0, 1),
    }
    arrays = read_tf_checkpoint(write_checkpoint(tmp_path / "m", entries, data))
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "half": "float16",
        "brain": "float32",
        "single": "float32",
        "scalar": "uint8",
    }
    np.testing.assert_array_equal(arrays["half"], halves)
    np.testing.assert_array_equal(arrays["brain"], singles)
    np.testing.assert_array_equal(arrays["single"], singles)
    assert arrays["scalar"] == ord("?")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": entry(1, (4,), 0, 16)}, "'a' lies beyond the 8 bytes"),
        ({"a": entry(1, (2,), 1 << 60, 8)}, "'a' lies beyond"),
        ({"a": entry(1, (1 << 40, 1 << 40), 0, 8)}, r"'a' has shape \(.*\) of float32, but 8 bytes"),
        ({"a": entry(1, ((1 << 64) - 1,), 0, 8)}, "shape is too large"),
        ({"a": entry(1, (1,) * 33, 0, 4)}, "shape is too large"),
        ({"a": entry(1, (2,), 0, 8), "b": entry(1, (2,), 0, 8)}, "variables overlap"),
        ({"a": entry(1, (2,), 0, 8, shard=1)}, "'a' is in data file 1 of 1"),
        ({"a": entry(1, (2,), 0, 8) + field(7, b"")}, "'a' is partitioned"),
        ({"a": b"\xff" * 11}, "a number has more than ten bytes"),
        ({"a": field(2, b"")[:1] + varint(1 << 50)}, "ends too early"),
        ({"a" * 2000: entry(1, (2,), 0, 8)}, "name is too long"),
    ],
)
def test_a_checkpoint_that_cannot_be_true_is_refused(
    tmp_path: Path, bad: dict[str, bytes], message: str
) -> None:
    prefix = write_checkpoint(tmp_path / "m", bad, bytes(8))
    with pytest.raises(InputError, match=rf"m.index cannot be read as .*{message}"):
        read_tf_checkpoint(prefix)


def test_a_compressed_or_big_endian_or_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is compressed"):
        read_tf_checkpoint(write_checkpoint(tmp_path / "m", {}, b"", compression=1))
    with pytest.raises(InputError, match="big-endian"):
        read_tf_checkpoint(write_checkpoint(tmp_path / "m", {}, b"", header=field(1, 1) + field(2, 1)))
    with pytest.raises(InputError, match=r"none.index does not exist"):
        read_tf_checkpoint(tmp_path / "none")
    prefix = write_checkpoint(tmp_path / "m", {"a": entry(1, (2,), 0, 8)}, bytes(8))
    (tmp_path / "m.data-00000-of-00001").unlink()
    with pytest.raises(InputError, match=r"m.data-00000-of-00001 does not exist"):
        read_tf_checkpoint(prefix)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_index_is_refused_and_never_more(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed with the checksums made good again, as a hostile file would have them, or cut."""
    entries = {"a": entry(1, (1, 2), 0, 8), "b": entry(14, (2,), 8, 4), "c": entry(7, (3,), 12, 1)}
    prefix = write_checkpoint(tmp_path / "m", entries, bytes(13))
    file = tmp_path / "m.index"
    index = bytearray(file.read_bytes())
    first = index.index(b"\0\x01\0\0\0\0", 10) + 6  # where the first block's checksum stands
    for _ in range(data.draw(st.integers(1, 4))):
        index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        index[first : first + 4] = _masked_crc32c(bytes(index[:first])).to_bytes(4, "little")
    else:
        del index[data.draw(st.integers(0, len(index))) :]
    file.write_bytes(index)
    with contextlib.suppress(InputError):
        read_tf_checkpoint(prefix)


# HDF5


def test_float_data_sets_are_read_by_path_and_others_left_out(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["layer/layer/kernel:0"] = np.arange(6.0, dtype="f4").reshape(2, 3)
        file["layer/half"] = np.array([0.5], "f2")
        file["layer/steps"] = np.array([3])
        file["big-endian"] = np.array([1.5], ">f4")
        file["empty"] = h5py.Empty("f")
    arrays = read_hdf5(tmp_path / "m.h5")
    assert sorted(arrays) == ["big-endian", "layer/half", "layer/layer/kernel:0"]
    assert torch.from_numpy(arrays["big-endian"]).item() == 1.5
    np.testing.assert_array_equal(arrays["layer/layer/kernel:0"], [[0, 1, 2], [3, 4, 5]])


def test_links_are_not_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["a"] = np.ones(3)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["own"] = np.zeros(3)
        file["soft"] = h5py.SoftLink("/own")
        file["external"] = h5py.ExternalLink("secret.h5", "/a")
    assert list(read_hdf5(tmp_path / "m.h5")) == ["own"]


def test_values_in_another_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("a", (3,), "f8", external=[(str(tmp_path / "secret"), 0, 24)])
    with pytest.raises(InputError, match=r"m.h5: a lies in another file"):
        read_hdf5(tmp_path / "m.h5")
    source = h5py.VirtualSource(tmp_path / "m.h5", "a", shape=(3,))
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = source
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("a", layout)
    with pytest.raises(InputError, match=r"v.h5: a lies in another file"):
        read_hdf5(tmp_path / "v.h5")


def test_terabytes_of_zeros_are_not_allocated(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("a", (1 << 40,), "f4", chunks=(1024,))
    with pytest.raises(InputError, match=r"m.h5: a \(1099511627776,\) is larger than the file"):
        read_hdf5(tmp_path / "m.h5")


def test_a_cut_or_foreign_or_missing_hdf5_file_is_refused(
    tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    file = tmp_path / "m.h5"
    shutil.copyfile(shared("parity") / "original_tiny/encoder.h5", file)
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(InputError, match=r"m.h5 is damaged or no HDF5 file"):
        read_hdf5(file)
    file.write_text("<html>")
    with pytest.raises(InputError, match=r"m.h5 is damaged or no HDF5 file"):
        read_hdf5(file)
    with pytest.raises(InputError, match=r"none.h5 does not exist"):
        read_hdf5(tmp_path / "none.h5")


def test_without_h5py_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install 'efficap\[hdf5\]'"):
        read_hdf5(Path("m.h5"))
