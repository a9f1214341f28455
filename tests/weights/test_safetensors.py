"""SafetensorsSource: what it reads, and every way in which a directory can be wrong."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.errors import CheckpointError
from jaxllm.weights.safetensors import SafetensorsFile, SafetensorsSource


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_was_written(hf_dir: Path, weights: dict[str, np.ndarray]) -> None:
    source = SafetensorsSource(hf_dir)
    assert sorted(source.names()) == sorted(weights)
    for name, weight in weights.items():
        assert source.info(name).shape == weight.shape
        assert source.info(name).dtype == "bfloat16"
        np.testing.assert_array_equal(source.read(name), weight.astype(ml_dtypes.bfloat16))
    assert source.config["hidden_size"] == 64


def test_read_is_a_view_that_cannot_be_written(hf_dir: Path) -> None:
    tensor = SafetensorsSource(hf_dir).read("model.norm.weight")
    assert not tensor.flags.owndata and not tensor.flags.writeable


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_dtypes_shapes_and_empty_tensors(tmp_path: Path, dtype: type) -> None:
    tensors = {"a": np.ones((2, 3), dtype), "b": np.ones((), dtype), "c": np.ones((0, 4), dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}, whole)
    content = whole.read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            SafetensorsFile(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry([2], 0, 8)}, bytes(9), "follow the last"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "overlaps"),
        ({"a": entry([2], 4, 12)}, bytes(12), "gap"),
        ({"a": entry([3], 0, 8)}, bytes(8), "cannot occupy"),
        ({"a": entry([2], 8, 0)}, bytes(8), "cannot occupy"),
        ({"a": entry([1 << 40, 1 << 40], 0, 8)}, bytes(8), "cannot occupy"),
        ({"a": entry([-2, -1], 0, 8)}, bytes(8), "malformed shape"),
        ({"a": entry([True, 2], 0, 8)}, bytes(8), "malformed shape"),
        ({"a": entry([2.0], 0, 8)}, bytes(8), "malformed shape"),
        ({"a": entry([2], 0, 8, "F33")}, bytes(8), "unknown dtype"),
        ({"a": entry([2], 0, 8) | {"x": 1}}, bytes(8), "malformed"),
        ({"a": [1]}, b"", "malformed"),
        ([1], b"", "JSON object"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":1}', b"x", "twice"),
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":NaN}', b"", "not valid JSON"),
    ],
)
def test_hostile_header(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=reason):
        SafetensorsFile(path)


def test_header_length_is_not_believed(tmp_path: Path) -> None:
    for length in (1 << 60, 99_000_000):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "x.safetensors")


@pytest.fixture
def sharded_dir(hf_dir: Path, weights: dict[str, np.ndarray]) -> Path:
    (hf_dir / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, hf_dir / file)
        weight_map |= dict.fromkeys(part, file)
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return hf_dir


def test_shards(sharded_dir: Path, weights: dict[str, np.ndarray]) -> None:
    source = SafetensorsSource(sharded_dir)
    assert sorted(source.names()) == sorted(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(source.read(name), weight)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index["weight_map"]) or index))

    return apply


def _point_norm_at(shard: Any) -> Callable[[Path], None]:
    return _edit(lambda weight_map: weight_map.__setitem__("model.norm.weight", shard))


SHARD_1, SHARD_2 = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / SHARD_2).unlink(), "missing"),
        (lambda d: (d / SHARD_1).write_bytes((d / SHARD_1).read_bytes()[:-1]), "truncated"),
        (lambda d: (d / SHARD_1).write_bytes(b""), "empty"),
        (lambda d: (d / SHARD_1).write_bytes((d / SHARD_2).read_bytes()), "does not say"),
        (_edit(lambda m: m.__setitem__("ghost", SHARD_1)), "in no shard"),
        (_edit(lambda m: m.pop("model.norm.weight") and None), "does not say"),
        (_edit(lambda m: {"weight_map": []}), "no weight_map"),
        (_edit(lambda m: {"weight_map": {}}), "no weight_map"),
        (_point_norm_at("../secret.safetensors"), "no shard beside"),
        (_point_norm_at("/etc/secret.safetensors"), "no shard beside"),
        (_point_norm_at("a\\b.safetensors"), "no shard beside"),
        (_point_norm_at("..\0.safetensors"), "no shard beside"),
        (_point_norm_at("weights.bin"), "no shard beside"),
        (_point_norm_at(7), "no shard beside"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text('{"num_hidden_layers": 1000000}'), "layers"),
        (lambda d: (d / "config.json").write_text('{"num_hidden_layers": -1}'), "layers"),
    ],
)
def test_damaged_directory(
    sharded_dir: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(sharded_dir)
    with pytest.raises(CheckpointError, match=reason):
        SafetensorsSource(sharded_dir)


def test_directory_without_weights(hf_dir: Path) -> None:
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        SafetensorsSource(hf_dir)


def test_unknown_tensor(hf_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="ghost"):
        SafetensorsSource(hf_dir).read("ghost")
