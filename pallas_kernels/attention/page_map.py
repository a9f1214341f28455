"""Which blocks of keys a kernel walks where a mask alone says what is hidden: for every decoding
row and every tile of prefill the blocks of which anything is seen, those seen whole apart.

The mask is asked for every pair of a query and a key, once per step for all layers that see alike:
elementwise work without channels, and without heads where it does not tell them apart. The map is
an operand, so no request compiles anything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.prefill_tiles import PrefillConfig, PrefillTiles
from pallas_kernels.attention.variant_params import param_arrays
from pallas_kernels.attention.xla_queries import (
    Mods,
    Pairs,
    Queries,
    decode_queries,
    param_values,
    visible_pairs,
)
from pallas_kernels.attention.xla_spans import Sight

_STRETCH = 64  # blocks whose places are counted together


class PageMap(NamedTuple):
    """Of N groups of queries, over C blocks of keys."""

    # The blocks that are seen in part, from the first key on, then those seen whole.
    order: Int[Array, "N C"]
    counts: Int[Array, "N 2"]  # blocks seen in part; all that are seen


def decode_map(seq_lens: Int[Array, " R"], num_heads: int, sight: Sight, block: int) -> PageMap:
    """Of one query per row, at position ``seq_lens - 1``. All its blocks count as seen in part, so
    that they are walked in order of position."""
    seen, _ = _ask(decode_queries(seq_lens), num_heads, sight, block)
    return _listed(seen, jnp.zeros_like(seen))


def prefill_map(
    tiles: PrefillTiles, num_heads: int, sight: Sight, config: PrefillConfig
) -> PageMap:
    """Of the tiles' own queries."""
    slot, _, position, low, high, written, *_ = tiles.table.T
    index = jnp.arange(config.tokens, dtype=jnp.int32)[None]
    own = (index >= low[:, None]) & (index < high[:, None]) & (written > 0)[:, None]
    positions = jnp.where(own, position[:, None] + index, -1)
    return _listed(*_ask(Queries(positions, slot, written), num_heads, sight, config.block_kv))


def _ask(
    queries: Queries, num_heads: int, sight: Sight, block: int
) -> tuple[Bool[Array, "N C"], Bool[Array, "N C"]]:
    """Which blocks are seen, and which of them whole: by all heads and all queries."""
    num_rows, max_pages = sight.tables
    params = param_arrays(sight.variant, num_heads, num_rows, sight.row_params)
    mods = Mods(1.0, sight.window, sight.variant, params, None)
    count = -(-max_pages * sight.page_size // block)
    keys = jnp.arange(count * block, dtype=jnp.int32).reshape(count, block)

    def visible(keys: Int[Array, " C"]) -> Bool[Array, "N _K Q C"]:
        pairs = Pairs.of(queries, keys[None], num_heads, 1)
        return visible_pairs(pairs, queries, mods, param_values(pairs, queries.rows, mods))

    # Block by block, so that what is summed lies side by side: XLA then needs one kernel.
    shown = once_per_axis(jax.vmap(visible), keys)
    found = jnp.sum(shown, axis=(2, 3, 4), dtype=jnp.int32).T
    asking = jnp.sum(queries.positions >= 0, axis=1, dtype=jnp.int32)
    most = asking * (shown.shape[2] * block)
    return found > 0, (found > 0) & (found == most[:, None])


def once_per_axis(function: Callable[..., Array], *given: Any) -> Array:
    """``function``, but what is spread over more axes is computed before. XLA would rather compute
    it again for every pair, which for a division by a number known only then is most of the time.
    """
    closed = jax.make_jaxpr(function)(*given)
    return _evaluate(closed, jax.tree.leaves(given))[0]


def _evaluate(closed: Any, given: list[Array]) -> list[Array]:
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, given, strict=True)

    def read(name: Any) -> Any:
        return name.val if hasattr(name, "val") else values[name]

    apart: set[Any] = set()
    for equation in closed.jaxpr.eqns:
        params, largest = equation.params, max(name.aval.size for name in equation.outvars)
        for name in equation.invars:
            if 1 < name.aval.size < largest and name not in apart:
                values[name] = jax.lax.optimization_barrier(read(name))
                apart.add(name)
        operands = [read(name) for name in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            found = _evaluate(params["jaxpr"], operands)
        else:
            params = equation.primitive.get_bind_params(params)
            found = equation.primitive.bind(*operands, **params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(name) for name in closed.jaxpr.outvars]


def _listed(seen: Bool[Array, "N C"], whole: Bool[Array, "N C"]) -> PageMap:
    """By counting, which is cheaper on a GPU than sorting."""
    count = seen.shape[1]  # below 2 ** 15: both counts in one number, so that one sum is enough
    each = jnp.where(whole, jnp.int32(1 << 16), seen.astype(jnp.int32))
    before = _sums_up_to(each)
    partials, wholes = before[:, -1] & 0xFFFF, before[:, -1] >> 16
    after = partials[:, None] + (before >> 16)
    place = jnp.where(whole, after, before & 0xFFFF) - 1
    place = jnp.where(seen, place, count)
    group = jnp.arange(seen.shape[0], dtype=jnp.int32)[:, None]
    blocks = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], seen.shape)
    order = jnp.zeros(seen.shape, jnp.int32).at[group, place].set(blocks, mode="drop")
    return PageMap(order, jnp.stack([partials, partials + wholes], axis=1))


def _sums_up_to(x: Int[Array, "N C"]) -> Int[Array, "N C"]:
    """A cumsum: XLA's is a chain of kernels on a GPU, one for each power of two."""
    groups, count = x.shape
    pads = -count % _STRETCH
    parts = jnp.pad(x, ((0, 0), (0, pads))).reshape(groups, -1, _STRETCH)
    within = _triangle(parts)
    before = _triangle(within[:, None, :, -1])[:, 0] - within[:, :, -1]
    return (within + before[:, :, None]).reshape(groups, -1)[:, :count]


def _triangle(x: Int[Array, "N P C"]) -> Int[Array, "N P C"]:
    """The sums of the last axis up to every place, each by itself: one reduction."""
    place = jnp.arange(x.shape[-1], dtype=jnp.int32)
    upto = (place[None] <= place[:, None])[None, None]
    return jnp.sum(jnp.where(upto, x[:, :, None], 0), axis=-1, dtype=jnp.int32)
