"""Lowered programs kept on disk, so that a warm start neither traces nor lowers.

Compiled programs are kept by JAX's compilation cache, but to look one up it must be lowered first,
which is Python: about a second for a program with kernels inside. ``jax.export`` writes the lowered
form (StableHLO in a flatbuffer, no pickle). The key is everything that shaped it, our source
included; what cannot be read is lowered anew.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxllm.layers.taps import Edits, Reads, TapArrays
from jaxllm.runner.row_layout import RowBuffers
from jaxllm.runner.step import StepSlots
from jaxllm.sampling.metadata import Logprobs, SamplerOutput

logger = logging.getLogger(__name__)

_OUR_PACKAGES = ("jaxllm", "pallas_kernels")
_SUFFIX = ".jaxexport"
MAX_BYTES, MAX_FILES = 2 * 2**30, 2000  # of a directory: what was of use last stays
_KERNEL_CALLS = ("mosaic_gpu_v2",)  # custom calls whose form is tied to the version in the key
_SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl")

for _node in (RowBuffers, StepSlots, SamplerOutput, Logprobs, Edits, Reads, TapArrays):
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jaxllm.{_node.__name__}",
        serialize_auxdata=lambda aux: b"",  # no static fields
        deserialize_auxdata=lambda data: (),
    )


class LoweringCache:
    """``directory`` None: nothing is kept. ``shaped_by``: what the programs depend on beside their
    own name, our source, the versions and the device; anything whose ``repr`` says it all.
    ``placed``: where results lie that are written over others; None: on the one device."""

    def __init__(
        self,
        directory: Path | None,
        *shaped_by: object,
        placed: jax.sharding.Sharding | None = None,
    ):
        self._directory = directory
        self._placed = placed
        self._shaped_by = repr((*shaped_by, jax_settings()))  # of this thread: others may differ

    def lower(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        donated: tuple[int, ...],
        overwrites_from: int | None = None,
    ) -> tuple[jax.stages.Lowered, tuple[jax.ShapeDtypeStruct, ...]]:
        """``jax.jit(function, donate_argnums=donated).lower(*args)``, from the disk if it is there;
        and the shapes of what results are written over (``spares.py``): those from the index
        ``overwrites_from`` on.
        """
        exported = self._exported(name, function, args)
        call = jax.jit(function) if exported is None else exported.call
        overwritten: tuple[jax.ShapeDtypeStruct, ...] = ()
        if overwrites_from is not None:
            results: Any = jax.eval_shape(call, *args)[overwrites_from:]
            specs = jax.tree.leaves(results)
            overwritten = tuple(
                jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._placed) for one in specs
            )
        return overwriting(call, args, donated, overwritten), overwritten

    def _exported(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> jax.export.Exported | None:
        """From the disk, where it is written if it can be kept. None: it cannot."""
        path = self.path(name, args)
        if path is None:
            return None
        exported = _read(path)
        if exported is None:
            try:
                exported = keep_lowered(path, function, args)
            except ValueError as error:  # a custom call that may not be kept
                logger.warning("%s is lowered at every start: %s", name, error)
                return None
            # Compiled from what was read back, so that the next start finds the very same program.
            exported = _read(path) or exported
        return exported

    def path(self, name: str, args: tuple[Any, ...]) -> Path | None:
        """The program's file, whether it is there or not. None: nothing is kept."""
        if self._directory is None:
            return None
        readable = re.sub(r"[^a-z0-9]+", "-", name)
        return self._directory / f"{readable}-{self._key(name, args)}{_SUFFIX}"

    def _key(self, name: str, args: tuple[Any, ...]) -> str:
        device: Any = jax.devices()[0]
        versions = [version(package) for package in ("jax", "jaxlib", "flax")]
        versions += [device.platform, device.device_kind]
        parts = (name, self._shaped_by, repr(args), *versions, _source_digest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def overwriting(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    donated: tuple[int, ...],
    overwritten: tuple[jax.ShapeDtypeStruct, ...],
) -> jax.stages.Lowered:
    """``function`` lowered for ``args``, those of ``donated`` updated in place, and its results
    that come after these written over one more argument, arrays of the shapes ``overwritten``.
    """
    if not overwritten:
        return jax.jit(function, donate_argnums=donated).lower(*args)

    def call(*given: Any) -> Any:
        return function(*given[:-1])

    # The last argument is unused, which is no reason to drop it.
    jitted = jax.jit(call, donate_argnums=(*donated, len(args)), keep_unused=True)
    return jitted.lower(*args, list(overwritten))


def jax_settings() -> tuple[tuple[str, str | bool | None], ...]:
    """Of JAX, those that shape programs, as they are here."""
    return tuple((setting, getattr(jax.config, setting)) for setting in _SETTINGS)


def keep_lowered(
    path: Path, function: Callable[..., Any], args: tuple[Any, ...], platform: str | None = None
) -> jax.export.Exported:
    """Lower a program and write it. ``platform``, as JAX names it: default that of this process.
    Raises ValueError for a custom call that may not be kept.
    """
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in _KERNEL_CALLS]
    platforms = None if platform is None else [platform]
    jitted = jax.jit(function)
    exported = jax.export.export(jitted, platforms=platforms, disabled_checks=checks)(*args)
    _write(path, bytes(exported.serialize()))
    return exported


def is_ours(*things: type | Callable[..., Any]) -> bool:
    """Whether all come from our own packages, whose source the key covers."""
    return all(thing.__module__.partition(".")[0] in _OUR_PACKAGES for thing in things)


@cache
def _source_digest() -> str:
    """Of every file that a program may come from: code and tuned tile sizes."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in _OUR_PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> jax.export.Exported | None:
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except FileNotFoundError:
        return None
    except Exception as error:  # a torn or foreign file costs time, never the start
        logger.warning("Lowering anew what %s cannot give: %s", path, error)
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return exported


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
        _trim(path.parent)
    except OSError as error:
        logger.warning("Cannot keep a lowered program in %s: %s", path.parent, error)


def _trim(directory: Path) -> None:
    """Forget what was of no use for longest; keys change with our source, so old ones never are."""
    found: list[tuple[float, int, Path]] = []
    for path in directory.glob(f"*{_SUFFIX}*"):  # what a killed process left half-written, too
        with suppress(FileNotFoundError):  # another process trims as well
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    kept = 0
    for index, (_, size, path) in enumerate(sorted(found, reverse=True)):
        kept += size
        if kept > MAX_BYTES or index >= MAX_FILES:
            path.unlink(missing_ok=True)
