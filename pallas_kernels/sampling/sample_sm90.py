"""Truncated sampling of whole vocabularies for Hopper (sm_90a), in Pallas Mosaic GPU.

Three launches. ``scan`` reads the logits once and keeps, of every group of columns, the four
largest values. ``select`` finds each row's threshold among those few thousand values; it is exact
as long as the threshold lies above every value that a group had to give up, and it knows when it
does not (then ``thresholds_xla`` searches the whole row). ``draw`` reads the logits again, out of
the L2 cache, and makes noise only for the tiles that hold a token above the threshold.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sampling.noise import gumbel, row_keys
from pallas_kernels.sampling.xla import thresholds_xla

_LOWEST = -3.0e38  # finite stand-in for -inf where two of them would be subtracted
_NO_TOKEN = 2**31 - 1
_KEPT = 4  # values kept per group
_VECTOR = 4  # float32 values one thread loads in one instruction
_TILE = 128 * _VECTOR
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """``splits`` thread blocks share a row, each with ``unroll`` tile loads in flight."""

    splits: int = 8
    unroll: int = 4

    def __post_init__(self) -> None:
        if self.splits < 4 or self.splits % 2:  # select pairs them, and pairs must be several
            raise ValueError(f"splits must be even and at least 4, not {self.splits}")
        if self.unroll < 1:
            raise ValueError(f"unroll must be positive, not {self.unroll}")

    def chunk(self, vocab: int) -> int:
        """Columns of one split: whole blocks of ``unroll`` tiles; depends on the vocabulary only,
        so that a row's bits do not depend on the batch."""
        block = self.unroll * _TILE
        return -(-vocab // (self.splits * block)) * block


class Truncation(NamedTuple):
    """Per-row parameters; see ``api.py``."""

    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]


def refuses_sample_sm90(vocab: int, platform: str) -> str | None:
    """None if the kernels take the shape, else the reason."""
    if platform != "sm_90":
        return f"the sampling kernels are built for sm_90, not {platform}"
    if vocab % _VECTOR or vocab < _TILE:
        return f"the sampling kernels take a multiple of {_VECTOR} >= {_TILE} columns, not {vocab}"
    return None


def sample_sm90(
    logits: Float[Array, "R V"],
    truncation: Truncation,
    seed: Int[Array, "R 2"],
    position: Int[Array, " R"],
    *,
    config: SampleConfig | None = None,
    interpret: Any = False,
) -> Int[Array, " R"]:
    """One token per row; see ``api.py``."""
    config = config or SampleConfig()
    greedy = truncation.temperature == 0
    scale = jnp.where(greedy, 1.0, truncation.temperature)
    # A greedy row keeps its largest value only, and gets no noise.
    truncation = Truncation(
        scale,
        jnp.where(greedy, 1, truncation.top_k),
        jnp.where(greedy, 1.0, truncation.top_p),
        jnp.where(greedy, 0.0, truncation.min_p),
    )
    threshold = thresholds_sm90(logits, truncation, config=config, interpret=interpret)
    noisy = jnp.where(greedy, 0, 1).astype(jnp.int32)
    keys = row_keys(seed, position)
    return draw_sm90(logits, scale, threshold, noisy, keys, config=config, interpret=interpret)


def thresholds_sm90(
    logits: Float[Array, "R V"],
    truncation: Truncation,
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> Float[Array, " R"]:
    """Least logit that each row keeps. Temperatures must not be zero."""
    found, exact = search_sm90(logits, truncation, config=config, interpret=interpret)

    def whole_rows() -> Float[Array, " R"]:
        searched = thresholds_xla(
            logits,
            truncation.temperature,
            truncation.top_k,
            truncation.top_p,
            truncation.min_p,
        )
        return jnp.where(exact, found, searched)

    return lax.cond(exact.all(), lambda: found, whole_rows)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def search_sm90(
    logits: Float[Array, "R V"],
    truncation: Truncation,
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    """Thresholds, and whether they could be told from the values that ``scan`` kept."""
    rows, vocab = logits.shape
    groups = (rows, config.splits, _KEPT, _TILE)
    tops, sums = plgpu.kernel(
        functools.partial(_scan, vocab, config),
        out_type=(
            jax.ShapeDtypeStruct(groups, jnp.float32),
            jax.ShapeDtypeStruct((rows, config.splits, _TILE), jnp.float32),
        ),
        grid=(rows, config.splits),
        grid_names=("row", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(logits, truncation.temperature)
    log_p = jnp.where(truncation.min_p > 0, jnp.log(truncation.min_p), -jnp.inf)
    floor = log_p * truncation.temperature
    threshold, exact = plgpu.kernel(
        functools.partial(_select, config.splits // 2),
        out_type=(
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        ),
        grid=(rows,),
        grid_names=("row",),
        interpret=interpret,
    )(tops, sums, truncation.temperature, truncation.top_k, truncation.top_p, floor)
    return threshold, exact > 0


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def draw_sm90(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    threshold: Float[Array, " R"],
    noisy: Int[Array, " R"],
    keys: Array,
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> Int[Array, " R"]:
    """Argmax of ``logits / temperature`` plus noise over the logits at or above the threshold."""
    rows, vocab = logits.shape
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


def _scan(
    vocab: int, config: SampleConfig, logits_ref: Any, temperature_ref: Any, *outs: Any
) -> None:
    tops_ref, sums_ref = outs
    row, split = lax.axis_index("row"), lax.axis_index("split")
    scale = _LOG2_E / temperature_ref[row]

    def block(start: jax.Array, carry: Any) -> Any:
        tops, total = carry
        values = [
            _tile(logits_ref, row, start + unit * _TILE, vocab)[0] for unit in range(config.unroll)
        ]
        before = jnp.maximum(tops[0], _LOWEST)
        for value in values:
            tops = _insert(tops, value)
        top = jnp.maximum(tops[0], _LOWEST)
        total = total * lax.exp2((before - top) * scale)
        for value in values:
            total = total + lax.exp2((value - top) * scale)
        return tops, total

    nothing = tuple(_full(-jnp.inf) for _ in range(_KEPT))
    tops, total = _blocks(vocab, config, split, block, (nothing, _full(0.0)))
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


def _select(half: int, *refs: Any) -> None:
    tops_ref, sums_ref, temperature_ref, top_k_ref, top_p_ref, floor_ref = refs[:6]
    threshold_ref, exact_ref = refs[6:]
    row = lax.axis_index("row")
    temperature, top_k, top_p = temperature_ref[row], top_k_ref[row], top_p_ref[row]
    splits = (pl.ds(0, half), pl.ds(half, half))

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=_layout(), optimized=False)

    first, second = (
        [load(tops_ref.at[row, part, rank]) for rank in range(_KEPT)] for part in splits
    )
    top = _reduce(jnp.max, jnp.maximum(first[0], second[0]))
    total = sum(
        _reduce(jnp.sum, load(sums_ref.at[row, part]) * jnp.exp((peak - top) / temperature))
        for part, peak in zip(splits, (first[0], second[0]), strict=True)
    )
    # Of two sorted lists of four, the four largest (in no order): the bitonic half-cleaner.
    values = [jnp.maximum(a, b) for a, b in zip(first, second[::-1], strict=True)]
    keys = [_ordered(value) for value in values]
    weights = [jnp.exp((value - top) / temperature) for value in values]
    # No group gave up a value above its least one, so nothing above ``bottom`` is missing.
    bottom = _reduce(jnp.max, functools.reduce(jnp.minimum, keys))
    lost = _reduce(jnp.max, functools.reduce(jnp.minimum, values))
    above = _reduce(jnp.max, functools.reduce(jnp.maximum, keys)) + 1

    def count(least: jax.Array) -> jax.Array:
        return _total([(key >= least).astype(jnp.int32) for key in keys])

    def least_value(key_found: jax.Array) -> jax.Array:
        parts = [jnp.where(key >= key_found, _unordered(key), jnp.inf) for key in keys]
        return _reduce(jnp.min, functools.reduce(jnp.minimum, parts))

    by_k = _search(
        bottom, jnp.where(top_k > 0, above, bottom), top_k, count, lambda _, n: n >= top_k
    )
    floor = top + floor_ref[row]
    k_known = (top_k <= 0) | (by_k > bottom) | (floor > lost)
    # What min-p and top-k keep.
    cut = jnp.maximum(jnp.where(by_k > bottom, least_value(by_k), -jnp.inf), floor)
    covered = cut > lost
    weights = [
        jnp.where(_unordered(key) >= cut, weight, 0.0)
        for key, weight in zip(keys, weights, strict=True)
    ]
    needed = top_p * jnp.where(covered, _total(weights), total)

    def enough(least: jax.Array, _: jax.Array) -> jax.Array:
        pairs = zip(keys, weights, strict=True)
        return _total([jnp.where(key >= least, weight, 0.0) for key, weight in pairs]) >= needed

    by_p = _search(bottom, jnp.where(top_p < 1.0, above, bottom), jnp.int32(-1), count, enough)
    p_known = (top_p >= 1.0) | ((by_p > bottom) & (covered | (cut == -jnp.inf)))
    nucleus = jnp.maximum(least_value(by_p), cut)
    threshold_ref[row] = jnp.where(top_p < 1.0, nucleus, cut)
    exact_ref[row] = (k_known & p_known).astype(jnp.int32)


def _search(low: jax.Array, high: jax.Array, goal: jax.Array, count: Any, enough: Any) -> jax.Array:
    """Largest key in [low, high) that is ``enough``, or one that keeps the same values; ``low`` is
    taken to be. Halves the range until it holds one value, or ``goal`` values lie above."""

    def unfinished(state: Any) -> jax.Array:
        low, high, at_low, at_high = state
        return (_middle(low, high) > low) & (at_low - at_high > 1) & (at_low != goal)

    def step(state: Any) -> Any:
        low, high, at_low, at_high = state
        middle = _middle(low, high)
        number = count(middle)
        up = enough(middle, number)
        return (
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, number, at_low),
            jnp.where(up, at_high, number),
        )

    return lax.while_loop(unfinished, step, (low, high, jnp.int32(2**30), jnp.int32(0)))[0]


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """Floor of the mean, without overflow."""
    return (low & high) + lax.shift_right_arithmetic(low ^ high, jnp.int32(1))


def _ordered(value: jax.Array) -> jax.Array:
    """int32 that compares like the float32 it comes from."""
    return _flip(lax.bitcast_convert_type(value, jnp.int32))


def _unordered(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(_flip(key), jnp.float32)


def _flip(bits: jax.Array) -> jax.Array:
    """Of negative floats, the greater magnitude is the lesser: flip all but the sign."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _total(parts: list[jax.Array]) -> jax.Array:
    return _reduce(jnp.sum, functools.reduce(jnp.add, parts))


def _reduce(function: Any, x: jax.Array) -> jax.Array:
    return function(function(x, axis=0), axis=0)


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
            _tile(logits_ref, row, start + unit * _TILE, vocab) for unit in range(config.unroll)
        ]

        def look(carry: Any) -> Any:
            for value, token in tiles:
                carry = lax.cond(
                    reaches(value), functools.partial(consider, value, token), lambda c: c, carry
                )
            return carry

        highest = functools.reduce(jnp.maximum, [value for value, _ in tiles])
        return lax.cond(reaches(highest), look, lambda c: c, carry)

    nothing = (_full(-jnp.inf), _full(_NO_TOKEN, jnp.int32))
    best, token = _blocks(vocab, config, split, block, nothing)
    most = jnp.max(best, axis=0)
    best_ref[row, split] = most
    token_ref[row, split] = jnp.min(jnp.where(best == most, token, _NO_TOKEN), axis=0)


def _blocks(vocab: int, config: SampleConfig, split: jax.Array, block: Any, carry: Any) -> Any:
    """Runs ``block(start, carry)`` over this split's columns."""
    chunk, size = config.chunk(vocab), config.unroll * _TILE
    begin = split * chunk
    columns = jnp.clip(vocab - begin, 0, chunk)
    blocks = lax.div(columns + (size - 1), jnp.int32(size))
    return lax.fori_loop(0, blocks, lambda i, c: block(begin + i * size, c), carry)


def _tile(ref: Any, row: Any, start: Any, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Values and token ids of one tile. A tile past the end is moved back into the row, and what an
    earlier tile has seen becomes -inf."""
    first = jnp.minimum(start, vocab - _TILE)
    value = plgpu.load(ref.at[row, pl.ds(first, _TILE)], layout=_layout(), optimized=False)
    token = plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=_layout()) + first
    return jnp.where(token >= start, value, -jnp.inf), token


def _full(value: float, dtype: Any = jnp.float32) -> jax.Array:
    return plgpu.layout_cast(jnp.full((_TILE,), value, dtype), _layout())


def _layout() -> Any:
    """A tile over the 128 threads: contiguous vectors, one warp's next to each other."""
    tiling = plgpu.Tiling(((_TILE,), (32 * _VECTOR,), (_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
