"""The first launch: reads the logits once and keeps the four largest of every group of columns.

A group is what one thread sees at one place of its vectors, in one split.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.sampling.sample_config import KEPT, LOG2_E, TILE, SampleConfig
from pallas_kernels.sampling.tiles_sm90 import full, load_tile, over_columns

_LOWEST = -3.0e38  # finite stand-in for -inf where two of them would be subtracted


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def scan_sm90(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    searched: Int[Array, " R"],
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> tuple[Float[Array, "R S 4 G"], Float[Array, "R S G"]]:
    """Of each of the G groups of every split: its four largest logits in falling order (-inf where
    there are fewer), and the sum of exp((logit - the group's largest) / temperature). Rows whose
    ``searched`` is 0 are not read, as if they were empty."""
    rows, vocab = logits.shape
    return plgpu.kernel(
        functools.partial(_scan, vocab, config),
        out_type=(
            jax.ShapeDtypeStruct((rows, config.splits, KEPT, TILE), jnp.float32),
            jax.ShapeDtypeStruct((rows, config.splits, TILE), jnp.float32),
        ),
        grid=(rows, config.splits),
        grid_names=("row", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(logits, temperature, searched)


def _scan(
    vocab: int,
    config: SampleConfig,
    logits_ref: Any,
    temperature_ref: Any,
    searched_ref: Any,
    tops_ref: Any,
    sums_ref: Any,
) -> None:
    row, split = lax.axis_index("row"), lax.axis_index("split")
    scale = LOG2_E / temperature_ref[row]

    def block(start: jax.Array, carry: Any) -> Any:
        tops, total = carry
        values = [
            load_tile(logits_ref, row, start + unit * TILE)[0] for unit in range(config.unroll)
        ]
        before = jnp.maximum(tops[0], _LOWEST)
        for value in values:
            tops = _insert(tops, value)
        top = jnp.maximum(tops[0], _LOWEST)
        total = total * lax.exp2((before - top) * scale)
        for value in values:
            total = total + lax.exp2((value - top) * scale)
        return tops, total

    begin = split * config.chunk(vocab)
    columns = jnp.where(searched_ref[row] > 0, config.columns(vocab, split), 0)
    nothing = tuple(full(-jnp.inf) for _ in range(KEPT))
    tops, total = over_columns(begin, columns, config.unroll, block, (nothing, full(0.0)))
    for rank, top in enumerate(tops):
        tops_ref[row, split, rank] = top
    sums_ref[row, split] = total


def _insert(tops: tuple[jax.Array, ...], value: jax.Array) -> tuple[jax.Array, ...]:
    """Keep the largest values seen, in falling order, element by element."""
    kept = []
    for top in tops:
        kept.append(jnp.maximum(top, value))
        value = jnp.minimum(top, value)
    return tuple(kept)
