"""A function computed in parts gives on every tile what it gives pair by pair."""

import operator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.pair_forms import Forms
from pallas_kernels.attention.pair_values import Apart, Positions, Residue, Tile
from pallas_kernels.attention.variant_params import OfPair

LEAST, MOST = -(2**31), 2**31 - 1
SHAPE = (6, 7)
PLACES = ((0, 0), (1_040, 1_037))  # the first query and key of a tile
RNG = np.random.default_rng(5)
RAW = RNG.normal(size=SHAPE).astype(np.float32)
TABLE = RNG.normal(size=SHAPE).astype(np.float32)
OWN, THEIRS = RNG.normal(size=SHAPE[0]), RNG.normal(size=SHAPE[1])
SCALE = 0.25
NUMBERS = {"n": 3, "m": -5, "most": MOST, "least": LEAST + 1, "f": 0.75}


def real(x: Any) -> Any:
    return x.astype(jnp.float32)


def scalars() -> dict[str, Any]:
    kinds = {int: jnp.int32, float: jnp.float32}
    return {name: kinds[type(value)](value) for name, value in NUMBERS.items()}


def in_parts(function: Any, is_score: bool, places: Any = PLACES) -> list[tuple[Any, Any]]:
    """The value for every place and its tile; what the first keeps serves the others."""
    found, kept = [], None
    for query, key in places:
        forms = Forms(SHAPE, kept)
        query_part, key_part = (jnp.arange(size, dtype=jnp.int32) for size in SHAPE)
        first, second = jnp.int32(query), jnp.int32(key)
        q_pos = Positions(lambda at=first, part=query_part: Apart(at, part))
        kv_pos = Positions(lambda at=second, part=key_part: Apart(at, None, part, is_still=True))
        own, theirs = Apart(queries=jnp.float32(OWN)), Apart(keys=jnp.float32(THEIRS))
        params = {name: Apart(value) for name, value in scalars().items()}
        space = SimpleNamespace(**params, table=Tile(jnp.asarray(TABLE)), t=OfPair(own, theirs))
        given: list[Any] = [q_pos, kv_pos, Apart(jnp.int32(2)), space]
        if is_score:
            given.insert(0, Tile(jnp.asarray(RAW), np.float32(SCALE)))
        value = forms.evaluate(function, *given)
        kept = forms.kept if kept is None else kept
        found.append((value, forms.tile(value)))
    return found


def direct(function: Any, is_score: bool) -> list[Any]:
    found = []
    own, theirs = jnp.float32(OWN)[:, None], jnp.float32(THEIRS)[None]
    space = SimpleNamespace(**scalars(), table=jnp.asarray(TABLE), t=OfPair(own, theirs))
    for query, key in PLACES:
        q_pos = query + jnp.arange(SHAPE[0], dtype=jnp.int32)[:, None]
        kv_pos = key + jnp.arange(SHAPE[1], dtype=jnp.int32)[None]
        given = [jnp.asarray(RAW * SCALE)] if is_score else []
        result = jnp.asarray(function(*given, q_pos, kv_pos, jnp.int32(2), space))
        found.append(jnp.broadcast_to(result, SHAPE))
    return found


def compare(got: Any, want: Any) -> None:
    for tile, right in zip(got, want, strict=True):
        assert tile.dtype == right.dtype
        if right.dtype == jnp.bool_:
            np.testing.assert_array_equal(tile, right)
        else:
            # Of a difference of positions times a factor both products are rounded.
            eps = float(jnp.finfo(right.dtype).eps)
            found, wanted = np.asarray(tile, np.float32), np.asarray(right, np.float32)
            np.testing.assert_allclose(found, wanted, rtol=8 * eps, atol=0.002 + 8 * eps)


def computed(functions: dict[str, Any], is_score: bool) -> dict[str, tuple[Any, Any]]:
    """Both ways, in one program for all, which the compiler need not make fast."""

    def both(function: Any) -> tuple[list[Any], list[Any]]:
        return [tile for _, tile in in_parts(function, is_score)], direct(function, is_score)

    def all_of_them() -> dict[str, Any]:
        return {name: both(function) for name, function in functions.items()}

    return jax.jit(all_of_them, compiler_options={"xla_backend_optimization_level": 0})()


@jax.jit
def remainder(number: Any, of: Any) -> Any:
    """Not jax.numpy's."""
    return number - of


def _of_three(number: Any, of: Any, more: Any) -> Any:
    return number - of * more


_of_three.__name__ = "remainder"
of_three = jax.jit(_of_three)


MASKS: dict[str, Any] = {
    "somebody's own remainder": lambda q, k, h, p: remainder(q - k, p.n) > 0,
    "one of three numbers": lambda q, k, h, p: of_three(q, k, p.n) > 0,
    "causal": lambda q, k, h, p: k <= q,
    "window": lambda q, k, h, p: q - k < p.n,
    "turned": lambda q, k, h, p: p.m < k - q,
    "both sides mix": lambda q, k, h, p: q - k <= (k + k) - (q + p.n),
    "no limit": lambda q, k, h, p: q - k < p.most,
    "no limit below": lambda q, k, h, p: q - k > p.least,
    "no limit of a query": lambda q, k, h, p: q - k > jnp.where(q % 3 == 0, p.least, p.n),
    "no limit of a key": lambda q, k, h, p: jnp.where(k % 3 == 0, p.most, p.n) > q - k,
    "a sum that is no difference": lambda q, k, h, p: (q + k) * 3 > 7 * k + q,
    "alike": lambda q, k, h, p: q - k == p.n,
    "unlike": lambda q, k, h, p: q - k != h,
    "of queries": lambda q, k, h, p: q % p.n == 1,
    "of keys": lambda q, k, h, p: (k // 4) % 2 == 0,
    "of neither": lambda q, k, h, p: p.n > h,
    "constant": lambda q, k, h, p: True,
    "remainder": lambda q, k, h, p: (q - k) % p.n == 0,
    "remainder, below zero": lambda q, k, h, p: (q - k) % p.m == 0,
    "remainder is not": lambda q, k, h, p: (k - q) % 4 != 0,
    "remainder of more": lambda q, k, h, p: (q - k + p.m) % p.n < 2,
    "remainder compared with one": lambda q, k, h, p: (q - k) % p.m == -1,
    "remainder by a query": lambda q, k, h, p: (q - k) % (q + 1) == 0,
    "remainder by a key": lambda q, k, h, p: (q - k) % -(k + 1) == 0,
    "remainder of blocks": lambda q, k, h, p: (q - k // 4) % p.n == 0,
    "remainder of chosen keys": lambda q, k, h, p: (q - jnp.where(k > 1_040, k, 9)) % p.n == 0,
    "remainder of a multiple": lambda q, k, h, p: (q - 5 * k) % p.n == 0,
    "two remainders": lambda q, k, h, p: ((q - k) % 3 == 0) | ((q - k // 2) % 5 == (q + k) % 2),
    "remainder of a remainder": lambda q, k, h, p: ((q - k) % 12) % 5 == 2,
    "and, or, not": lambda q, k, h, p: ~(q < k) & ((k > p.n) | (q == 1_040)),
    "bits": lambda q, k, h, p: (q ^ k) & 3 == (q >> 1) & 1,
    "a token's": lambda q, k, h, p: p.t.key <= p.t.query,
    "turned round": lambda q, k, h, p: ~(q - k > p.n) | jnp.logical_not(q > 1_041),
    "a bool of whole numbers": lambda q, k, h, p: ((q - k) % 2).astype(bool),
    "chosen by a query": lambda q, k, h, p: jnp.where(q > 1_042, k > 1_040, q - k < 3),
    "chosen by nothing": lambda q, k, h, p: jnp.where(p.n > h, k > 1_040, q - k < 3),
    "on the edge of a quotient": lambda q, k, h, p: real((q - k) * 41) / 41.0 >= 1.0,
    "on the edge of a product": lambda q, k, h, p: real(q - k) * 0.1 <= jnp.float32(0.3),
}
SCORES: dict[str, Any] = {
    "as it is": lambda s, q, k, h, p: s,
    "cap": lambda s, q, k, h, p: p.f * jnp.tanh(s / p.f),
    "by distance": lambda s, q, k, h, p: s - p.f * real(q - k),
    "below zero": lambda s, q, k, h, p: -(s * p.f + real(k)) / 2.0,
    "of tokens": lambda s, q, k, h, p: (s + p.t.key) * p.f - p.t.query,
    "a number less it": lambda s, q, k, h, p: p.f - s,
    "a token's less it": lambda s, q, k, h, p: p.t.key - 2.0 * s,
    "twice": lambda s, q, k, h, p: s + s * p.f,
    "times a key's": lambda s, q, k, h, p: s * p.t.key + p.t.query,
    "by a key's": lambda s, q, k, h, p: s / (p.t.key + 9.0),
    "where of a key": lambda s, q, k, h, p: jnp.where(k > 1_040, s + 2.0, s),
    "where of a query": lambda s, q, k, h, p: jnp.where(q > 1_042, s, s + p.t.query),
    "where of both": lambda s, q, k, h, p: jnp.where(q > k, s + 2.0, s - p.t.key),
    "where of one, added of the other": lambda s, q, k, h, p: jnp.where(k > 9, s + p.t.query, s),
    "where scales differ": lambda s, q, k, h, p: jnp.where(k > 1_040, s * 2.0, s),
    "where of neither": lambda s, q, k, h, p: jnp.where(p.n > h, s + 1.0, s),
    "a table": lambda s, q, k, h, p: s + p.table * 2.0 - real(k),
    "a table where": lambda s, q, k, h, p: jnp.where(q > 1_042, s, p.table),
    "a remainder": lambda s, q, k, h, p: s + real((q - k) % p.n) * p.f,
    "curves": lambda s, q, k, h, p: s + jnp.exp2(real(q - k) / -64.0) * jnp.sin(real(k)),
    "half": lambda s, q, k, h, p: (s.astype(jnp.float16) * jnp.float16(0.5) + 1).astype(s.dtype),
    "brain": lambda s, q, k, h, p: s + (q - k).astype(jnp.bfloat16).astype(jnp.float32) / 8.0,
    "a half result": lambda s, q, k, h, p: (p.t.key - p.t.query).astype(jnp.float16) + 1,
    "without a sign": lambda s, q, k, h, p: s + real(-((q - k).astype(jnp.uint32)) % 5),
    "within a function": lambda s, q, k, h, p: s + jax.nn.relu(p.t.key) * jax.nn.silu(p.t.query),
    "within functions": lambda s, q, k, h, p: jax.nn.softplus(s) + jax.nn.elu(p.t.key),
    "the normal distribution's": lambda s, q, k, h, p: jax.nn.gelu(3.0 * s, approximate=False),
    "its other half": lambda s, q, k, h, p: jax.lax.erfc(s + p.t.key),
    "logarithms": lambda s, q, k, h, p: s * jnp.log1p(jnp.abs(real(q - k))) - jnp.expm1(s),
    "a quotient's steps": lambda s, q, k, h, p: s - jnp.floor(real((q - k) * 41) / 41.0),
    "whole parts": lambda s, q, k, h, p: s + jnp.ceil(s * 9) + jnp.trunc(s * 7) - jnp.floor(-s * 5),
    "whole parts of large": lambda s, q, k, h, p: s + jnp.floor(real(q) * 3e7) * 1e-7,
    "rounded": lambda s, q, k, h, p: s + jnp.round(real(q - k) / 2.0),
    "a real remainder": lambda s, q, k, h, p: s + real(q - k) % 2.5 + real(q - k) // -1.5,
    "roots": lambda s, q, k, h, p: jnp.abs(s) ** 0.5 + real(q) ** -0.5 + jnp.abs(s) ** 1.5,
    "a power of a number": lambda s, q, k, h, p: s * 2.0 ** (-real(q - k) * p.f),
    "a power of below zero": lambda s, q, k, h, p: s + jnp.float32(p.m) ** (real(q - k) / 4.0 + 1),
    "a whole power of below zero": lambda s, q, k, h, p: s + real(q - k) ** real((q - k) % 4),
    "a power, written down": lambda s, q, k, h, p: s**3.0 + s**2 - real(q - k) ** 2.0 / 64.0,
    "finite": lambda s, q, k, h, p: jnp.where(jnp.isfinite(s / real(q - k)), s, p.f),
    "without gradients": lambda s, q, k, h, p: s + jax.lax.stop_gradient(p.t.key) * p.f,
    "constant": lambda s, q, k, h, p: jnp.float32(2.0),
    "of neither": lambda s, q, k, h, p: p.f + real(h),
}


@pytest.fixture(scope="module")
def masks() -> dict[str, tuple[Any, Any]]:
    return computed(MASKS, is_score=False)


@pytest.fixture(scope="module")
def scores() -> dict[str, tuple[Any, Any]]:
    return computed(SCORES, is_score=True)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, masks: dict[str, tuple[Any, Any]]) -> None:
    compare(*masks[name])


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, scores: dict[str, tuple[Any, Any]]) -> None:
    compare(*scores[name])


LEAVES: tuple[Any, ...] = (
    lambda q, k, h, p: q,
    lambda q, k, h, p: k,
    lambda q, k, h, p: q - k,
    lambda q, k, h, p: p.n,
    lambda q, k, h, p: p.m + h,
)
JOINS: tuple[Any, ...] = (
    lambda p, x, y: x + y,
    lambda p, x, y: x - y,
    lambda p, x, y: p.n - x,
    lambda p, x, y: x * p.m,
    lambda p, x, y: x % 7,
    lambda p, x, y: x % p.m,
    lambda p, x, y: y // 3,
    lambda p, x, y: jnp.where(x < y, x, y),
)
COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)


def number(rng: np.random.Generator, depth: int) -> Any:
    """A function that gives a small int32."""
    if depth == 0:
        return LEAVES[rng.integers(len(LEAVES))]
    one, other = (number(rng, depth - 1) for _ in range(2))
    join = JOINS[rng.integers(len(JOINS))]
    return lambda q, k, h, p: join(p, one(q, k, h, p), other(q, k, h, p))


def drawn(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    numbers = [number(rng, depth) for depth in (1, 2, 3, 2)]
    first, second = (COMPARISONS[rng.integers(len(COMPARISONS))] for _ in range(2))

    def mask(*pair: Any) -> Any:
        x, y, z, w = (jnp.asarray(given(*pair)) for given in numbers)
        return first(x, y) | second(z, w)

    return mask


def test_masks_drawn_at_random() -> None:
    for found in computed({str(seed): drawn(seed) for seed in range(8)}, False).values():
        compare(*found)


def test_what_stays_in_parts() -> None:
    """What all this is for: no operation on pairs but the last."""

    def look() -> None:
        def value(function: Any, is_score: bool) -> Any:
            return in_parts(function, is_score, PLACES[:1])[0][0]

        by_distance = value(SCORES["by distance"], True)
        assert isinstance(by_distance, Tile)
        assert by_distance.factor == SCALE
        assert by_distance.rest is not None
        assert by_distance.rest.mixes
        chosen = value(SCORES["where of a key"], True)
        assert chosen.rest.keys is not None
        assert chosen.rest.queries is None
        assert isinstance(value(MASKS["of keys"], False), Apart)
        assert isinstance(value(lambda q, k, h, p: (q - k) % p.n, False), Residue)

    jax.eval_shape(look)


def test_positions_are_made_only_where_they_are_looked_at() -> None:
    def fail() -> Apart:
        raise AssertionError

    space = SimpleNamespace(f=Apart(jnp.float32(2)))
    query, key = Positions(fail), Positions(fail)
    score = Tile(jnp.asarray(RAW), np.float32(1))
    value = Forms(SHAPE).evaluate(
        lambda s, q, k, h, p: s * p.f, score, query, key, Apart(jnp.int32(0)), space
    )
    assert isinstance(value, Tile)


def test_keys_are_divided_once_for_all_tiles() -> None:
    def count(function: Any) -> int:
        forms = Forms(SHAPE)
        query = Apart(jnp.int32(7), jnp.arange(SHAPE[0]))
        key = Apart(jnp.int32(64), None, jnp.arange(SHAPE[1]), is_still=True)
        forms.evaluate(function, query, key)
        return len(forms.kept)

    assert count(lambda q, k: ((q - k) % 3 == 0) | ((k - q) % 5 == 0)) == 2
    assert count(lambda q, k: (q - k // 4) % 3 == 0) == 0
