"""Parameters on the device: from a checkpoint, or random. The only files of this room that
import JAX are this, checkpoint.py and convert.py. Nothing is read before every name, shape and
dtype is known to fit.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxllm.parallel.cuts import own_rows
from jaxllm.parallel.mesh import BY_ROW, DeviceMesh
from jaxllm.weights.assembly import Assembly, nbytes
from jaxllm.weights.mapping import WeightRule
from jaxllm.weights.sources import TensorSource

DUMMY_SCALE = 0.02


def arrange(
    params: dict[str, jax.Array], fused: Mapping[str, tuple[int, ...]], devices: DeviceMesh
) -> None:
    """Give each device its rows of fused products. ``fused``: of such parameters, how many rows of
    every product a device has.
    """
    own = {  # layers are alike
        pieces: jax.jit(
            devices.spread(partial(own_rows, pieces=pieces), BY_ROW, BY_ROW), donate_argnums=0
        )
        for pieces in set(fused.values())
    }
    for name, pieces in fused.items():
        # One at a time: each is on every device whole meanwhile. In place, or the last would leave
        # a hole that pages may be too large for.
        params[name] = own[pieces](params[name]).block_until_ready()


def load_params(
    spec: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[WeightRule],
    source: TensorSource,
    *,
    ignore: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Every parameter of ``spec``, cast to its dtype and put where its sharding says.

    Host memory stays near twice the largest parameter. Raises CheckpointError, before any data is
    read, naming what is missing, unexpected or wrong.
    """
    assembly = Assembly(spec, rules, source, ignore)
    params: dict[str, jax.Array] = {}
    with tqdm(
        total=assembly.total_bytes, desc="Loading weights", unit="B", unit_scale=True, disable=None
    ) as progress:
        for name, wanted in spec.items():
            array = jax.device_put(assembly.read(name), wanted.sharding)
            # A transfer still in flight keeps its host copy; waiting keeps only one of them.
            params[name] = array.block_until_ready()
            progress.update(nbytes(wanted))
    return params


@partial(jax.jit, static_argnames="wanted")
def _random(key: jax.Array, *, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Made where it belongs: one device may not have room for all of it."""
    made = jax.random.normal(key, wanted.shape, wanted.dtype)
    made *= jnp.asarray(DUMMY_SCALE, wanted.dtype)
    if wanted.sharding is None:
        return made
    return jax.lax.with_sharding_constraint(made, wanted.sharding)


def dummy_params(spec: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
    """Random parameters made on the device: norm weights are one, the rest normal * 0.02.

    A parameter depends on ``seed`` and its own name only. Every shape compiles once.
    """
    root = jax.random.key(seed)
    params: dict[str, jax.Array] = {}
    for name, wanted in spec.items():
        if name.endswith("norm.weight"):
            params[name] = jnp.ones(wanted.shape, wanted.dtype, device=wanted.sharding)
        else:
            key = jax.random.fold_in(root, zlib.crc32(name.encode()))
            params[name] = _random(key, wanted=wanted)
    return params
