"""The converted checkpoint: Orbax arrays in our own tree, config, tokenizer and a manifest.

    DST/params/<parameter>/zarr.json, c/...   zarr 3, uncompressed, chunks of at most 64 MiB
    DST/config.json, tokenizer.json, ...      as in a Hugging Face directory
    DST/MANIFEST.json                         written last

Plain zarr instead of OCDBT: one folder a parameter lets the reader compare every declared shape
with the files' sizes before Orbax opens anything, which a database file does not.
"""

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future
from tqdm import tqdm

from jaxllm.errors import CheckpointError
from jaxllm.weights.assembly import FLOAT_DTYPES, SHOWN, Assembly, nbytes, numpy_dtype
from jaxllm.weights.atomic_directory import atomic_directory, fsync_tree
from jaxllm.weights.json_file import read_json_object
from jaxllm.weights.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    Manifest,
    build_manifest,
    verify_manifest,
)
from jaxllm.weights.sources import TensorInfo

PARAMS = "params"
CHUNK_BYTES = 64 << 20
_ORBAX_FILES = {"_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"}
_SHARD_CODEC_BYTES = 4 + 16  # crc32c and the index of the one chunk in each file


@dataclass(frozen=True, slots=True)
class _LazyArray:
    """A leaf that is made when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves one after the other, so that one parameter is in memory, not the model.

    On disk the result is the same as for numpy leaves.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        values: Sequence[_LazyArray],
        infos: Sequence[Any],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Future]:
        save_args = args or [ocp.SaveArgs()] * len(values)

        async def write_in_turn() -> None:
            for value, info, arg in zip(values, infos, save_args, strict=True):
                futures = await super(_LazyArrayHandler, self).serialize(
                    [value.read()], [info], [arg]
                )
                for future in futures:
                    await asyncio.to_thread(future.result)

        return [CommitFutureAwaitingContractedSignals(write_in_turn(), name="params")]

    def memory_size(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, values: Sequence[_LazyArray]
    ) -> Sequence[tuple[int, int]]:
        return [(nbytes(value), nbytes(value)) for value in values]


@contextmanager
def _quiet_orbax():
    """Orbax warns of what is as it should be (no database files to merge)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _handler(restore_gb: int | None = None) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        restore_concurrent_gb=restore_gb,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (_LazyArray, _LazyArrayHandler()),
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
        ),
    )


def write_checkpoint(
    destination: Path,
    assembly: Assembly,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    force: bool = False,
) -> None:
    """Write all parameters of ``assembly`` with ``config`` and ``files`` (name to content).

    ``destination`` appears whole in one rename or not at all. Host memory stays near twice the
    largest parameter. Raises CheckpointError; OSError when the disk is full or read-only.
    """
    with atomic_directory(destination, replace=force) as directory:
        _write_params(directory / PARAMS, assembly)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        (directory / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2))
        parameters = {
            name: TensorInfo(tuple(spec.shape), np.dtype(spec.dtype).name)
            for name, spec in assembly.spec.items()
        }
        manifest = build_manifest(directory, parameters)
        _check_arrays(directory, manifest)
        # Flushed before the manifest exists: after a power cut it never vouches for lost pages.
        fsync_tree(directory)
        (directory / MANIFEST_FILE).write_bytes(manifest.to_bytes())


def _write_params(directory: Path, assembly: Assembly) -> None:
    with tqdm(
        total=assembly.total_bytes, desc="Converting", unit="B", unit_scale=True, disable=None
    ) as progress:

        def reader(name: str) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:
                array = assembly.read(name)
                progress.update(array.nbytes)
                return array

            return read

        tree = {
            name: _LazyArray(tuple(spec.shape), np.dtype(spec.dtype), reader(name))
            for name, spec in assembly.spec.items()
        }
        save_args = {
            name: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(a)) for name, a in tree.items()
        }
        try:
            with _quiet_orbax(), ocp.Checkpointer(_handler()) as checkpointer:
                checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            raise CheckpointError(f"cannot write {directory.name}: {error}") from error


def _chunk_bytes(array: _LazyArray) -> int | None:
    """CHUNK_BYTES, or None (one chunk) where the largest dimension has no fitting divisor.

    Orbax splits into equal parts: a prime number of rows would give a file for every row.
    """
    length = max(array.shape, default=1)
    row = nbytes(array) // max(length, 1)
    fitting = [d for d in range(1, length + 1) if length % d == 0 and d * row <= CHUNK_BYTES]
    return CHUNK_BYTES if fitting and fitting[-1] * row >= CHUNK_BYTES // 16 else None


def load_converted(
    directory: Path,
    spec: Mapping[str, jax.ShapeDtypeStruct],
    *,
    hashes: bool = True,
) -> dict[str, jax.Array]:
    """The parameters of ``spec``, cast to its dtypes and put where its shardings say.

    Before Orbax reads a byte: the manifest is compared with the directory (``hashes`` also compares
    contents), with ``spec``, and with the shapes and sizes that the array files declare. Raises
    CheckpointError.
    """
    manifest = verify_manifest(directory, hashes)
    _check_spec(manifest, spec)
    _check_arrays(directory, manifest)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = {
        name: ocp.ArrayRestoreArgs(
            sharding=wanted.sharding or default, global_shape=wanted.shape, dtype=wanted.dtype
        )
        for name, wanted in spec.items()
    }
    largest = max(nbytes(wanted) for wanted in spec.values())
    handler = _handler(restore_gb=2 + math.ceil(2 * largest / 1e9))
    arguments = ocp.args.PyTreeRestore(item=dict(spec), restore_args=restore_args)
    try:
        with _quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(directory.absolute() / PARAMS, args=arguments)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the arrays of {directory}: {error}") from error


def _check_spec(manifest: Manifest, spec: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Same names and shapes. Dtypes may differ: all are floats and are cast on loading."""
    found = manifest.parameters
    problems = [f"parameter {name!r} is missing" for name in spec if name not in found]
    problems += [f"parameter {name!r} is unexpected" for name in found if name not in spec]
    problems += [
        f"parameter {name!r} has shape {found[name].shape}, expected {tuple(wanted.shape)}"
        for name, wanted in spec.items()
        if name in found and found[name].shape != tuple(wanted.shape)
    ]
    if problems or not spec:
        raise CheckpointError(
            "The checkpoint does not fit the model: " + "; ".join(problems[:SHOWN])
        )


def _check_arrays(directory: Path, manifest: Manifest) -> None:
    """Everything below params/ belongs to a parameter and is exactly as large as it must be."""
    expected = {f"{PARAMS}/{name}" for name in _ORBAX_FILES}
    for name, info in manifest.parameters.items():
        chunk, grid = _read_zarr(directory / PARAMS / name / "zarr.json", info)
        size = math.prod(chunk) * numpy_dtype(info.dtype).itemsize + _SHARD_CODEC_BYTES
        expected.add(f"{PARAMS}/{name}/zarr.json")
        for index in np.ndindex(*grid):
            path = "/".join([PARAMS, name, "c", *map(str, index)])
            expected.add(path)
            if path not in manifest.files or manifest.files[path].size != size:
                raise CheckpointError(f"the array file {path} must have {size} bytes")
    for path in manifest.files:
        if path.startswith(f"{PARAMS}/") and path not in expected:
            raise CheckpointError(f"the file {path} belongs to no parameter")
    tree = read_json_object(directory / PARAMS / "_METADATA").get("tree_metadata")
    keys = {repr((name,)) for name in manifest.parameters}
    if not isinstance(tree, dict) or set(tree) != keys or any(map(_is_elsewhere, tree.items())):
        raise CheckpointError(f"{PARAMS}/_METADATA does not list exactly the model's parameters")


def _is_elsewhere(item: tuple[str, Any]) -> bool:
    """Whether the entry's own key path differs from the name it is filed under."""
    key, entry = item
    path = entry.get("key_metadata") if isinstance(entry, dict) else None
    names = [part.get("key") for part in path if isinstance(part, dict)] if path else []
    return repr(tuple(names)) != key


def _read_zarr(path: Path, info: TensorInfo) -> tuple[list[int], list[int]]:
    """Chunk shape and chunk counts, when the file is what this module writes for ``info``."""
    meta = read_json_object(path, max_bytes=1 << 16)
    try:
        chunk = meta["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = meta["codecs"]
        inner = sharding["configuration"]
        codecs = [codec["name"] for codec in inner["codecs"]]
        plain = (sharding["name"], codecs, inner["chunk_shape"]) == (
            "sharding_indexed",
            ["bytes"],
            chunk,
        )
        same = (tuple(meta["shape"]), meta["data_type"]) == (info.shape, info.dtype)
        whole = len(chunk) == len(info.shape) and all(
            type(c) is int and c > 0 and n % c == 0 for c, n in zip(chunk, info.shape, strict=True)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is malformed") from error
    if not (plain and same and whole and info.dtype in FLOAT_DTYPES):
        raise CheckpointError(f"{path} does not describe {info.shape} {info.dtype}")
    return chunk, [n // c for n, c in zip(info.shape, chunk, strict=True)]
