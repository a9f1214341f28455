"""The last launch: reads the logits again, out of the L2 cache, and makes noise only for the tiles
that hold a token above the threshold.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt

from pallas_kernels.sampling.noise import gumbel
from pallas_kernels.sampling.sample_config import TILE, SampleConfig
from pallas_kernels.sampling.tiles_sm90 import full, load_tile, over_columns

_NO_TOKEN = 2**31 - 1
_THREAD_BLOCKS = 512  # some four for each of the device's processors


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def draw_sm90(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    threshold: Float[Array, " R"],
    noisy: Int[Array, " R"],
    keys: UInt[Array, "R 2"],
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> Int[Array, " R"]:
    """Argmax of ``logits / temperature``, plus noise where ``noisy`` is 1, over the logits at or
    above the threshold; the first of equals. 0 where there is none."""
    rows, vocab = logits.shape
    config = _spread(config, rows, vocab)
    best, token = plgpu.kernel(
        functools.partial(_draw, vocab, config),
        out_type=(
            jax.ShapeDtypeStruct((rows, config.splits), jnp.float32),
            jax.ShapeDtypeStruct((rows, config.splits), jnp.int32),
        ),
        grid=(rows, config.splits),
        grid_names=("row", "split"),
        interpret=interpret,
    )(logits, temperature, threshold, noisy, keys)
    winner = jnp.where(best == best.max(axis=1, keepdims=True), token, _NO_TOKEN).min(axis=1)
    return jnp.where(winner == _NO_TOKEN, 0, winner)


def _spread(config: SampleConfig, rows: int, vocab: int) -> SampleConfig:
    """More splits where few rows would leave the device idle: an argmax has the same bits however
    it is divided."""
    blocks = -(-vocab // (config.unroll * TILE))
    splits = max(config.splits, min(_THREAD_BLOCKS // rows, blocks) // 2 * 2)
    return dataclasses.replace(config, splits=splits)


def _draw(vocab: int, config: SampleConfig, logits_ref: Any, *refs: Any) -> None:
    temperature_ref, threshold_ref, noisy_ref, keys_ref, best_ref, token_ref = refs
    row, split = lax.axis_index("row"), lax.axis_index("split")
    temperature, threshold = temperature_ref[row], threshold_ref[row]
    noisy = noisy_ref[row].astype(jnp.float32)
    key0, key1 = keys_ref[row, 0], keys_ref[row, 1]

    def consider(value: jax.Array, token: jax.Array, carry: Any) -> Any:
        best, best_token = carry
        noise = gumbel(key0, key1, token.astype(jnp.uint32)) * noisy
        value = jnp.where(value >= threshold, value / temperature + noise, -jnp.inf)
        better = value > best
        return jnp.where(better, value, best), jnp.where(better, token, best_token)

    def reaches(value: jax.Array) -> jax.Array:
        return jnp.max(value, axis=0) >= threshold

    def block(start: jax.Array, carry: Any) -> Any:
        tiles = [
            load_tile(logits_ref, row, start + unit * TILE)[0] for unit in range(config.unroll)
        ]

        def look(unit: jax.Array, carry: Any) -> Any:
            # Loaded once more, from the L1 cache: the noise is much code, and has to be there once.
            value, token = load_tile(logits_ref, row, start + unit * TILE)
            return lax.cond(
                reaches(value), functools.partial(consider, value, token), lambda c: c, carry
            )

        looks = jnp.where(reaches(functools.reduce(jnp.maximum, tiles)), config.unroll, 0)
        return lax.fori_loop(0, looks, look, carry)

    begin, columns = split * config.chunk(vocab), config.columns(vocab, split)
    nothing = (full(-jnp.inf), full(_NO_TOKEN, jnp.int32))
    best, token = over_columns(begin, columns, config.unroll, block, nothing)
    most = jnp.max(best, axis=0)
    best_ref[row, split] = most
    token_ref[row, split] = jnp.min(jnp.where(best == most, token, _NO_TOKEN), axis=0)
