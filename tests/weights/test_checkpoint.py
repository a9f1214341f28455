"""The converted checkpoint: written whole or not at all, and refused when anything is off."""

import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxllm.errors import CheckpointError
from jaxllm.weights import checkpoint as checkpoint_module
from jaxllm.weights.assembly import Assembly
from jaxllm.weights.checkpoint import load_converted, write_checkpoint
from jaxllm.weights.manifest import MANIFEST_FILE, build_manifest, verify_manifest
from jaxllm.weights.mapping import WeightRule
from jaxllm.weights.sources import TensorInfo

SHAPES = {"embed.weight": (50, 8), "layers.0.qkv.weight": (12, 8), "norm.weight": (8,)}
FILES = {"tokenizer.json": b"{}", "generation_config.json": b"{}"}


class MemorySource:
    """Random tensors, named as the parameters are."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.tensors = {
            name: generator.standard_normal(shape).astype(ml_dtypes.bfloat16)
            for name, shape in SHAPES.items()
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].shape, "bfloat16")

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def spec(dtype: Any = jnp.bfloat16, **changed: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = SHAPES | {name.replace("_", "."): shape for name, shape in changed.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def assembly(dtype: Any = jnp.bfloat16) -> Assembly:
    rules = [WeightRule(name, (name,)) for name in SHAPES]
    return Assembly(spec(dtype), rules, MemorySource())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written") / "ck"
    write_checkpoint(directory, assembly(), {"hidden_size": 8}, FILES)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "ck"))


@pytest.fixture
def no_orbax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax must not be reached."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("Orbax opened a checkpoint that should have been refused")

    monkeypatch.setattr(ocp, "Checkpointer", reached)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
@pytest.mark.parametrize("hashes", [True, False])
def test_round_trip(written: Path, dtype: Any, hashes: bool) -> None:
    params = load_converted(written, spec(dtype), hashes=hashes)
    assert set(params) == set(SHAPES)
    for name, tensor in MemorySource().tensors.items():
        assert isinstance(params[name], jax.Array) and params[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(params[name]), tensor.astype(dtype))


def test_what_is_in_it(written: Path) -> None:
    manifest = verify_manifest(written)
    assert manifest.parameters == {n: TensorInfo(s, "bfloat16") for n, s in SHAPES.items()}
    assert json.loads((written / "config.json").read_text()) == {"hidden_size": 8}
    assert (written / "tokenizer.json").read_bytes() == b"{}"
    digest = json.loads((written / MANIFEST_FILE).read_text())["config_sha256"]
    assert digest == hashlib.sha256((written / "config.json").read_bytes()).hexdigest()


def test_large_parameters_are_cut_into_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", 256)
    write_checkpoint(tmp_path / "ck", assembly(), {}, {})
    chunks = list((tmp_path / "ck/params/embed.weight/c").rglob("0"))
    assert len([path for path in chunks if path.is_file()]) > 1
    params = load_converted(tmp_path / "ck", spec())
    expected = MemorySource().tensors["embed.weight"]
    np.testing.assert_array_equal(np.asarray(params["embed.weight"]), expected)


def test_a_prime_number_of_rows_is_one_chunk() -> None:
    lazy = checkpoint_module._LazyArray((151_643, 4096), np.dtype(np.float16), lambda: np.zeros(1))
    assert checkpoint_module._chunk_bytes(lazy) is None
    lazy = checkpoint_module._LazyArray((151_936, 4096), np.dtype(np.float16), lambda: np.zeros(1))
    assert checkpoint_module._chunk_bytes(lazy) == checkpoint_module.CHUNK_BYTES


def test_one_parameter_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read must find the previous parameter's array already released."""
    import gc
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    original = Assembly.read

    def read(self: Assembly, target: str) -> np.ndarray:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        array = original(self, target)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(Assembly, "read", read)
    write_checkpoint(tmp_path / "ck", assembly(), {}, {})
    assert len(alive) == len(SHAPES) and most <= 1


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (lambda: spec(norm_weight=(9,)), r"'norm.weight' has shape \(8,\), expected \(9,\)"),
        (lambda: spec(embed_weight=(8, 50)), "'embed.weight' has shape"),
        (lambda: spec(other=(1,)), "'other' is missing"),
        (lambda: {"norm.weight": spec()["norm.weight"]}, "unexpected"),
        (dict, "unexpected"),
    ],
)
@pytest.mark.usefixtures("no_orbax")
def test_another_models_spec(written: Path, wanted: Callable[[], Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_converted(written, wanted())


@pytest.mark.usefixtures("no_orbax")
def test_every_file_removed_cut_or_flipped(copy: Path) -> None:
    chance = random.Random(0)
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        content = file.read_bytes()
        place = chance.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        for damaged in (content[: len(content) // 2], content[:-1], bytes(flipped)):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_converted(copy, spec())
        file.unlink()
        with pytest.raises(CheckpointError):
            load_converted(copy, spec())
        file.write_bytes(content)


def reseal(directory: Path, parameters: dict[str, TensorInfo] | None = None) -> None:
    """A new, valid manifest over altered content: what a hostile author would ship."""
    old = verify_parameters(directory)
    (directory / MANIFEST_FILE).unlink()
    manifest = build_manifest(directory, parameters or old)
    (directory / MANIFEST_FILE).write_bytes(manifest.to_bytes())


def verify_parameters(directory: Path) -> dict[str, TensorInfo]:
    raw = json.loads((directory / MANIFEST_FILE).read_text())["parameters"]
    return {name: TensorInfo(tuple(info["shape"]), info["dtype"]) for name, info in raw.items()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


ZARR = "params/norm.weight/zarr.json"


def huge(meta: dict[str, Any]) -> None:
    meta["shape"] = [1 << 42]
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 42]
    meta["codecs"][0]["configuration"]["chunk_shape"] = [1 << 42]


def compressed(meta: dict[str, Any]) -> None:
    meta["codecs"][0]["configuration"]["codecs"].append({"name": "zstd"})


def tiny_chunks(meta: dict[str, Any]) -> None:
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [0]
    meta["codecs"][0]["configuration"]["chunk_shape"] = [0]


def elsewhere(meta: dict[str, Any]) -> None:
    entry = meta["tree_metadata"].pop("('norm.weight',)")
    meta["tree_metadata"]["('/etc/secret',)"] = entry


def other_key(meta: dict[str, Any]) -> None:
    meta["tree_metadata"]["('norm.weight',)"]["key_metadata"][0]["key"] = "/etc/secret"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (ZARR, huge),
        (ZARR, compressed),
        (ZARR, tiny_chunks),
        (ZARR, lambda meta: meta.__setitem__("data_type", "float32")),
        (ZARR, lambda meta: meta.pop("codecs")),
        (ZARR, lambda meta: meta.__setitem__("codecs", [1, 2])),
        (ZARR, lambda meta: meta.__setitem__("chunk_grid", [])),
        ("params/_METADATA", elsewhere),
        ("params/_METADATA", other_key),
        ("params/_METADATA", lambda meta: meta.pop("tree_metadata")),
    ],
)
@pytest.mark.usefixtures("no_orbax")
def test_hostile_arrays_under_a_valid_manifest(copy: Path, file: str, change: Any) -> None:
    edit_json(copy / file, change)
    reseal(copy)
    verify_manifest(copy)
    with pytest.raises(CheckpointError):
        load_converted(copy, spec())


@pytest.mark.usefixtures("no_orbax")
def test_hostile_files_under_a_valid_manifest(copy: Path) -> None:
    chunk = copy / "params/norm.weight/c/0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    reseal(copy)
    with pytest.raises(CheckpointError, match="must have"):
        load_converted(copy, spec())
    chunk.write_bytes(content)
    (copy / "params/manifest.ocdbt").write_bytes(b"x")
    reseal(copy)
    with pytest.raises(CheckpointError, match="no parameter"):
        load_converted(copy, spec())


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Looks at the destination at every write, flush and rename: what a kill there would leave."""
    seen: list[str] = []
    destination = tmp_path / "ck"

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                seen.append(name)
                for directory in tmp_path.glob("ck*"):
                    if directory == destination:
                        verify_manifest(directory)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (os, "rename"), (Path, "write_bytes"), (Assembly, "read")):
        watch(owner, name)
    return iter([seen])


def test_the_destination_is_never_half_done(watched: Iterator[list[str]], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ck", assembly(), {}, FILES)
    seen = next(watched)
    assert seen.count("rename") >= 1 and seen.count("fsync") > 10
    verify_manifest(tmp_path / "ck")
    assert os.listdir(tmp_path) == ["ck"]


def test_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, written_files = Path.write_bytes, []

    def write_bytes(self: Path, data: bytes) -> int:
        written_files.append(self.name)
        if self.name == MANIFEST_FILE:
            assert (self.parent / "config.json").exists()
            assert (self.parent / "params" / "_METADATA").exists()
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    write_checkpoint(tmp_path / "ck", assembly(), {}, FILES)
    assert written_files[-1] == MANIFEST_FILE


@pytest.mark.parametrize("target", list(SHAPES))
def test_a_failing_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    original = Assembly.read

    def read(self: Assembly, name: str) -> np.ndarray:
        if name == target:
            raise CheckpointError("does not fit into float16")
        return original(self, name)

    monkeypatch.setattr(Assembly, "read", read)
    with pytest.raises(CheckpointError, match="float16"):
        write_checkpoint(tmp_path / "ck", assembly(), {}, {})
    assert os.listdir(tmp_path) == []


def test_existing_destination(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="--force"):
        write_checkpoint(copy, assembly(), {}, {})
    write_checkpoint(copy, assembly(jnp.float32), {}, {}, force=True)
    assert verify_manifest(copy).parameters["norm.weight"].dtype == "float32"
