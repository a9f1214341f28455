"""The second launch: every row's threshold, from the values that the scan kept.

No group gave up a value above its least one. So the search among some thousand kept values is exact
where it ends above the largest of these, and elsewhere bounds the threshold from both sides. Then
the thread block goes on between the bounds over the whole row, in as many passes as it takes: what
a row costs depends on its own logits only, and nobody else has to know.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.sampling.sample_config import KEPT, LOG2_E, TILE, SampleConfig, Truncation
from pallas_kernels.sampling.tiles_sm90 import full, load, load_tile, over_columns

_ROW_UNROLL = 16  # tile loads in flight while a whole row is searched
_LEAST_KEY = -0x7F800001  # of -inf
_LEAST_FINITE = -3.4028235e38


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def select_sm90(
    logits: Float[Array, "R V"],
    tops: Float[Array, "R S 4 G"],
    sums: Float[Array, "R S G"],
    truncation: Truncation,
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> Float[Array, " R"]:
    """Least logit that each row keeps, or a number between it and the next one below; finite, so
    that no -inf is kept. ``tops`` and ``sums`` are those of the scan. Temperatures must not be
    zero, and top-k less than V."""
    floor = jnp.where(truncation.min_p > 0, jnp.log(truncation.min_p), -jnp.inf)
    return plgpu.kernel(
        functools.partial(_select, config.splits // 2),
        out_type=jax.ShapeDtypeStruct(logits.shape[:1], jnp.float32),
        grid=logits.shape[:1],
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        logits,
        tops,
        sums,
        truncation.temperature,
        truncation.top_k,
        truncation.top_p,
        floor * truncation.temperature,
    )


def _select(half: int, logits_ref: Any, tops_ref: Any, sums_ref: Any, *refs: Any) -> None:
    temperature_ref, top_k_ref, top_p_ref, floor_ref, threshold_ref = refs
    row = lax.axis_index("row")
    scale = LOG2_E / temperature_ref[row]
    top_k, top_p = top_k_ref[row], top_p_ref[row]
    splits = (pl.ds(0, half), pl.ds(half, half))

    first, second = (
        [load(tops_ref.at[row, part, rank]) for rank in range(KEPT)] for part in splits
    )
    top = _reduce(jnp.max, jnp.maximum(first[0], second[0]))
    total = sum(
        _reduce(jnp.sum, load(sums_ref.at[row, part]) * lax.exp2((peak - top) * scale))
        for part, peak in zip(splits, (first[0], second[0]), strict=True)
    )
    # Of two sorted lists of four, the four largest (in no order): the bitonic half-cleaner.
    values = [jnp.maximum(a, b) for a, b in zip(first, second[::-1], strict=True)]
    keys = [_ordered(value) for value in values]
    # The largest that a group may have given up: all above it are here.
    lost = _reduce(jnp.max, functools.reduce(jnp.minimum, keys))
    above = _reduce(jnp.max, functools.reduce(jnp.maximum, keys)) + 1

    def counted(least: jax.Array) -> jax.Array:
        return _total([(key >= least).astype(jnp.int32) for key in keys])

    def as_many(least: jax.Array) -> _Found:
        number = counted(least)
        return number, number >= top_k

    by_k = _search(lost, above, top_k, as_many, top_k > 0)
    floor = _key_of(top + floor_ref[row])
    k_known = (top_k <= 0) | (by_k > lost) | (floor > lost)
    # What min-p and top-k keep, if k is known.
    cut = jnp.maximum(by_k, floor)
    weights = [
        jnp.where(key >= cut, lax.exp2((value - top) * scale), 0.0)
        for key, value in zip(keys, values, strict=True)
    ]
    # Else too much is needed, and what is found for p is a bound from below.
    p_bounded = k_known & ((cut > lost) | (cut == _LEAST_KEY))
    needed = top_p * jnp.where(cut > lost, _total(weights), total)

    def as_heavy(least: jax.Array) -> _Found:
        pairs = zip(keys, weights, strict=True)
        mass = _total([jnp.where(key >= least, weight, 0.0) for key, weight in pairs])
        return counted(least), mass >= needed

    by_p = _search(lost, above, jnp.int32(-1), as_heavy, top_p < 1.0)
    known = k_known & ((top_p >= 1.0) | (p_bounded & (by_p > lost)))
    whole = _WholeRow(logits_ref, row, top, scale)
    threshold = lax.cond(
        known,
        lambda: jnp.maximum(cut, by_p),
        lambda: whole.threshold(
            floor,
            _Wish(top_k, by_k, jnp.where(k_known, by_k, lost + 1)),
            _Wish(top_p, by_p, jnp.where(p_bounded, lost + 1, above)),
        ),
    )
    threshold_ref[row] = jnp.maximum(_value_of(threshold), _LEAST_FINITE)


# How many lie at or above a key, and whether they are enough.
_Found = tuple[jax.Array, jax.Array]


class _Wish(NamedTuple):
    """``top_k`` or ``top_p``, and where its key lies: at ``low`` or above, below ``high``."""

    value: jax.Array
    low: jax.Array
    high: jax.Array


class _WholeRow(NamedTuple):
    """A row of logits where it lies, for what the kept values cannot tell."""

    logits_ref: Any
    row: jax.Array
    top: jax.Array
    scale: jax.Array

    def threshold(self, floor: jax.Array, k: _Wish, p: _Wish) -> jax.Array:
        """The key that the contract asks for, between the bounds. First for k, then for p, in one
        piece of code: what is unrolled here takes long to compile."""

        def stage(index: jax.Array, cut: jax.Array) -> jax.Array:
            for_p = index > 0
            low = jnp.where(for_p, jnp.maximum(p.low, cut), k.low)
            high = jnp.where(for_p, p.high, k.high)
            # Negative: the first pass has to find what all above the cut weigh.
            needed = jnp.where(for_p, -1.0, 0.0)

            def unfinished(state: Any) -> jax.Array:
                (low, high, at_low, at_high), needed = state
                open_ = (_middle(low, high) > low) & (at_low - at_high > 1)
                return (needed < 0) | (open_ & (for_p | (at_low != k.value)))

            def step(state: Any) -> Any:
                bounds, needed = state
                least = jnp.where(needed < 0, cut, _middle(bounds[0], bounds[1]))
                number, mass = self._at_or_above(least)
                enough = jnp.where(for_p, mass >= needed, number >= k.value)
                closer = _narrowed(bounds, least, number, enough)
                bounds = tuple(
                    jnp.where(needed < 0, old, new) for old, new in zip(bounds, closer, strict=True)
                )
                return bounds, jnp.where(needed < 0, p.value * mass, needed)

            bounds = (low, high, jnp.int32(2**30), jnp.int32(0))
            found = lax.while_loop(unfinished, step, (bounds, needed))[0][0]
            return jnp.where(for_p, found, jnp.maximum(found, floor))

        return lax.fori_loop(0, jnp.where(p.value < 1.0, 2, 1), stage, jnp.int32(_LEAST_KEY))

    def _at_or_above(self, least: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Number and weight of the logits with that key or a greater one; one pass."""
        edge = _value_of(least)

        def block(start: jax.Array, carry: Any) -> Any:
            number, mass = carry
            values = [
                load_tile(self.logits_ref, self.row, start + unit * TILE)[0]
                for unit in range(_ROW_UNROLL)
            ]
            for value in values:
                counts = value >= edge
                number = number + counts.astype(jnp.int32)
                weight = lax.exp2((value - self.top) * self.scale)
                mass = mass + jnp.where(counts, weight, 0.0)
            return number, mass

        nothing = (full(0, jnp.int32), full(0.0))
        number, mass = over_columns(0, self.logits_ref.shape[1], _ROW_UNROLL, block, nothing)
        return jnp.sum(number, axis=0), jnp.sum(mass, axis=0)


def _search(
    lost: jax.Array,
    above: jax.Array,
    goal: jax.Array,
    probe: Callable[[jax.Array], _Found],
    wanted: jax.Array,
) -> jax.Array:
    """Largest key below ``above`` that is enough, or one that keeps the same values; the least key
    is taken to be, and is the answer if none is wanted. Looks above ``lost`` first, where what is
    found is exact. Then halves the range until it holds one value, or ``goal`` values lie above."""

    def unfinished(state: Any) -> jax.Array:
        (low, _, at_low, at_high), key = state
        return (key > low) & (at_low - at_high > 1) & (at_low != goal)

    def step(state: Any) -> Any:
        bounds, key = state
        bounds = _narrowed(bounds, key, *probe(key))
        return bounds, _middle(bounds[0], bounds[1])

    bounds = (jnp.int32(_LEAST_KEY), above, jnp.int32(2**30), jnp.int32(0))
    start = jnp.where(wanted, lost + 1, _LEAST_KEY)
    return lax.while_loop(unfinished, step, (bounds, start))[0][0]


def _narrowed(bounds: Any, key: jax.Array, number: jax.Array, enough: jax.Array) -> Any:
    """Bounds (low, high, and how many lie above each) after a look at a key between them."""
    low, high, at_low, at_high = bounds
    return (
        jnp.where(enough, key, low),
        jnp.where(enough, high, key),
        jnp.where(enough, number, at_low),
        jnp.where(enough, at_high, number),
    )


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """Floor of the mean, without overflow."""
    return (low & high) + lax.shift_right_arithmetic(low ^ high, jnp.int32(1))


def _ordered(value: jax.Array) -> jax.Array:
    """int32 key that compares like the float32 it comes from."""
    return _flip(lax.bitcast_convert_type(value, jnp.int32))


def _key_of(value: jax.Array) -> jax.Array:
    """Of a scalar, through a tile: Mosaic has no bitcast of scalars."""
    return jnp.max(_ordered(full(value)), axis=0)


def _value_of(key: jax.Array) -> jax.Array:
    """The scalar that a key comes from."""
    return jnp.max(lax.bitcast_convert_type(_flip(full(key, jnp.int32)), jnp.float32), axis=0)


def _flip(bits: jax.Array) -> jax.Array:
    """Of negative floats, the greater magnitude is the lesser: flip all but the sign."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _total(parts: list[jax.Array]) -> jax.Array:
    return _reduce(jnp.sum, functools.reduce(jnp.add, parts))


def _reduce(function: Any, x: jax.Array) -> jax.Array:
    return function(function(x, axis=0), axis=0)
