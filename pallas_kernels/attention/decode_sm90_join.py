"""How the CTAs that share a row make one answer of their partial sums, inside the decode kernel.

Each CTA leaves its partial sums in global memory and then counts itself in, where its row and KV
head are counted. Whoever counts last finds all sums there, joins them in order of position and
writes the answer. No CTA ever waits for another, so nothing is assumed about which of them run at
a time; and who comes last decides who joins, never what: the bits are the same.

A count is an input of the kernel that every launch leaves as it found it, at zero. For XLA it never
changes, so one array serves all layers of a step, without a memset or a copy between them.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_config import GROUP_TILE
from pallas_kernels.attention.decode_sm90_sums import (
    MASKED,
    Ref,
    Sum,
    empty_sum,
    join,
    load_partial,
)

# Above 128 registers a CTA would be alone on its SM, which costs more than these round trips.
JOINED_DIM = 64  # a slice of the head dim that is joined at a time
_IN_FLIGHT = 4  # partial sums read at a time


class Shares(NamedTuple):
    """The partial sums of one row."""

    base: Array  # slot of the first
    first: Array  # number of the first, counted from position 0
    end: Array
    are_splits: Array  # else chunks


def count_in(count: Ref, others: Array, *, interpret: bool) -> Array:
    """Whether ``others`` came before; if so ``count`` is zero again, as it was before the first.

    All threads of the warpgroup must come here. The first barrier orders their stores before the
    count, which is a release; the second orders the count, which is an acquire, before their
    loads. At the scope of the card, so that both hold between CTAs: what any warpgroup stored
    before it counted, the last one sees.
    """
    if interpret:  # one CTA after the other
        before = count[...]
        count[...] = jnp.where(before == others, jnp.int32(0), before + 1)
        return before == others

    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    return inline(_count_in)(count, others) == 1


def _count_in(_: Any, count: Any, others: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """``atom.inc`` goes back to zero past its limit. Pallas has no atomic that returns a value."""
    limit = others.registers.item()
    is_last = mgpu.utils.inline_ptx(
        """{
            .reg .pred chosen, last;
            .reg .u32 thread, before;
            bar.sync $3, 128;
            mov.u32 thread, %tid.x;
            and.b32 thread, thread, 127;
            setp.eq.u32 chosen, thread, 0;
            mov.u32 before, 0xffffffff;
            @chosen atom.acq_rel.gpu.global.inc.u32 before, [$1], $2;
            setp.eq.u32 last, before, $2;
            bar.red.or.pred last, $3, 128, last;
            selp.s32 $0, 1, 0, last;
        }""",
        mgpu.utils.memref_ptr(count),
        limit,
        mgpu.utils.warpgroup_barrier_idx(sync=False),
        result_types=limit.type,
        has_side_effects=True,
        convergent=True,
    )
    return mgpu.FragmentedArray.splat(is_last, (), is_signed=True)


def join_shares(shares: Shares, values: Ref, stats: Ref, splits_per_chunk: int) -> Sum:
    """A slice of the sum of a row: ``values`` [S, JOINED_DIM, GROUP_TILE] and ``stats`` [S, 2,
    GROUP_TILE] are of its KV head. Splits are joined to their chunk first, chunks go straight to
    the row."""
    batch = min(_IN_FLIGHT, splits_per_chunk)
    nothing = empty_sum(JOINED_DIM, GROUP_TILE)

    def load(index: Array) -> Sum:
        slot = shares.base + lax.clamp(shares.first, index, shares.end - 1) - shares.first
        partial = load_partial(values.at[slot], stats.at[slot])
        exists = lax.broadcast((index >= shares.first) & (index < shares.end), (GROUP_TILE,))
        return partial._replace(maximum=jnp.where(exists, partial.maximum, MASKED))

    def one_batch(index: Array, carry: tuple[Sum, Sum]) -> tuple[Sum, Sum]:
        row, chunk = carry
        loaded = [load(index * batch + i) for i in range(batch)]  # all in flight at once
        chunk = functools.reduce(join, loaded, chunk)
        place = lax.rem((index + 1) * batch, jnp.int32(splits_per_chunk))
        is_whole = shares.are_splits & (place == 0)
        return _choose(is_whole, join(row, chunk), row), _choose(is_whole, nothing, chunk)

    size = jnp.int32(batch)
    batches = (lax.div(shares.first, size), lax.div(shares.end + (size - 1), size))
    return join(*lax.fori_loop(*batches, one_batch, (nothing, nothing)))


def _choose(condition: Array, yes: Sum, no: Sum) -> Sum:
    pairs = zip(yes, no, strict=True)
    return Sum(*(jnp.where(lax.broadcast(condition, a.shape), a, b) for a, b in pairs))
