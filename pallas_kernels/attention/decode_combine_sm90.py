"""Adds up the partial results of rows that were cut into several splits, in order of position."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

_EMPTY = -1e30
_LANES = 128
_ELEMENTS = 512  # of one partial that a CTA adds up: 16 bytes per thread and load
_BATCH = 8  # partials in flight

Ref = Any  # a GMEM reference inside a kernel


def combine_splits(
    out: Float[Array, "R H D"],
    partials: Float[Array, "S H D"],
    logsumexp: Float[Array, "S K N"],
    row_slots: Int[Array, " R"],
    row_splits: Int[Array, " R"],
    *,
    interpret: Any = False,
) -> Float[Array, "R H D"]:
    """Returns ``out`` with the rows of more than one split replaced. Row r's partials are the
    ``row_splits[r]`` slots from ``row_slots[r]`` on; ``logsumexp`` is to base 2.
    """
    (rows, heads, dim), dtype = out.shape, out.dtype
    kv_heads = logsumexp.shape[1]
    group = heads // kv_heads
    smallest = max(_LANES // dim, 1)  # heads that give every thread an element
    tile = min(heads, _ELEMENTS // dim) // smallest * smallest
    layout = plgpu.Layout.WG_STRIDED((tile, dim), vec_size=tile * dim // _LANES)

    def body(parts: Ref, lse: Ref, slots: Ref, splits: Ref, out: Ref) -> None:
        row = lax.axis_index("row")
        count = splits[row]

        @pl.when(count > 1)
        def _() -> None:
            # The last tile may overlap the one before, which then writes the same values twice.
            first = lax.min(lax.axis_index("tile") * tile, jnp.int32(heads - tile))
            base = slots[row]
            local = plgpu.broadcasted_iota(jnp.int32, (tile, dim), 0, layout=layout)

            def weight(slot: Array, exists: Array) -> Array:
                vector = jnp.full((tile, dim), _EMPTY, jnp.float32)
                for i in range(tile):
                    kv_head = lax.div(first + i, jnp.int32(group))
                    value = lse[slot, kv_head, lax.rem(first + i, jnp.int32(group))]
                    value = jnp.where(exists, value, _EMPTY)
                    vector = jnp.where(local == i, value, vector)
                return vector

            def batch(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
                total, denominator, maximum = carry
                loaded = []
                for i in range(_BATCH):
                    split = index * _BATCH + i
                    slot = base + lax.min(split, count - 1)
                    part = plgpu.load(parts.at[slot, pl.ds(first, tile)], layout=layout)
                    loaded.append((part, weight(slot, split < count)))
                raised = maximum
                for _part, logit in loaded:
                    raised = jnp.maximum(raised, logit)
                decay = jnp.exp2(maximum - raised)
                total, denominator = total * decay, denominator * decay
                for part, logit in loaded:
                    share = jnp.exp2(logit - raised)
                    total, denominator = total + share * part, denominator + share
                return total, denominator, raised

            def full(value: float) -> Array:
                return plgpu.layout_cast(jnp.full((tile, dim), value, jnp.float32), layout)

            batches = lax.div(count + (_BATCH - 1), jnp.int32(_BATCH))
            state = (full(0.0), full(0.0), full(_EMPTY))
            total, denominator, _ = lax.fori_loop(0, batches, batch, state)
            out[row, pl.ds(first, tile)] = (total / denominator).astype(dtype)

    target = jax.new_ref(out)
    plgpu.kernel(
        body,
        out_type=(),
        grid=(rows, -(-heads // tile)),
        grid_names=("row", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(partials, logsumexp, row_slots, row_splits, target)
    return jax.freeze(target)
