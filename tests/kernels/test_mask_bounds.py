"""What bounds say of a mask is true of every pair, in blocks and with numbers of all kinds."""

from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.mask_bounds import Bounds, seen_whole
from pallas_kernels.attention.variant_params import OfPair

LEAST, MOST = -(2**31), 2**31 - 1
QUERIES, KEYS = 5, 4
NUMBERS = (LEAST, LEAST + 1, -(2**30), -7, -2, -1, 1, 2, 3, 8, 2**30, MOST - 3, MOST)
# First query, first key, and the params n, m (int32) and f (float32).
CASES = [
    *product((0, 6, 70_000), (0, 5, 12, 69_998), NUMBERS, (-3, 1, 2, MOST), (-2.5, 0.5)),
    *product((6,), (5,), (3,), NUMBERS, (-3e38, 0.0, 1e-30, 3e38)),
]


def told(mask: Any, q: Any, k: Any, n: Any, m: Any, f: Any) -> Any:
    """Whether bounds say that all of a block is seen; None if they never can."""
    absent, table = (jax.ShapeDtypeStruct((), jnp.dtype(x)) for x in ("float32", "int32"))
    params = SimpleNamespace(n=n, m=m, f=f, some=(m, n), table=table, t=OfPair(absent, absent))
    query, key = Bounds(q, q + (QUERIES - 1)), Bounds(k, k + (KEYS - 1))
    return seen_whole(mask, query, key, jnp.int32(1), params)


def true(mask: Any, q: Any, k: Any, n: Any, m: Any, f: Any) -> Any:
    zero, table = jnp.float32(0), jnp.int32(0)
    params = SimpleNamespace(n=n, m=m, f=f, some=(m, n), table=table, t=OfPair(zero, zero))
    q_pos, kv_pos = q + jnp.arange(QUERIES)[:, None], k + jnp.arange(KEYS)[None]
    return jnp.all(jnp.asarray(mask(q_pos, kv_pos, jnp.int32(1), params)))


def blocks(masks: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of every case what is said and what is so."""
    types = (np.int32, np.int32, np.int32, np.int32, np.float32)
    given = [np.array(column, t) for column, t in zip(zip(*CASES, strict=True), types, strict=True)]

    def all_of_them(given: Any) -> dict[str, Any]:
        return {
            name: [jax.vmap(partial(ask, mask))(*given) for ask in (told, true)]
            for name, mask in masks.items()
        }

    # One program, which the compiler need not make fast.
    return jax.jit(all_of_them, compiler_options={"xla_backend_optimization_level": 0})(given)


def real(x: Any) -> Any:
    return x.astype(jnp.float32)


# How much of what is seen whole they recognise, at least.
TOLD = {
    "a window": (lambda q, k, h, p: q - k < p.n, 1.0),
    "turned": (lambda q, k, h, p: k - q >= -p.n, 0.9),
    "a sum that wraps": (lambda q, k, h, p: k + p.n > q, 0.4),
    "a difference that wraps": (lambda q, k, h, p: q - p.n <= k, 0.4),
    "a product that wraps": (lambda q, k, h, p: (q - k) * p.n < 100, 0.4),
    "a negative that wraps": (lambda q, k, h, p: -(k + p.n) <= p.m, 0.4),
    "wraps twice": (lambda q, k, h, p: (k + p.n) + p.n >= q, 0.2),
    "wraps and is made small": (lambda q, k, h, p: (k + p.n) // 1024 >= -5, 0.4),
    "and": (lambda q, k, h, p: (q >= k) & (k >= p.m), 0.9),
    "or": (lambda q, k, h, p: (q < k) | (k < p.n), 0.5),
    "not": (lambda q, k, h, p: ~(q < k) & ~(k == p.n), 0.5),
    "equal": (lambda q, k, h, p: (q // 8 == k // 8) & (k != p.m), 0.5),
    "blocks": (lambda q, k, h, p: k // p.n >= q // p.n - 1, 0.3),
    "rounded to zero": (lambda q, k, h, p: jax.lax.div(q - k, p.n) <= 1, 0.5),
    "divided": (lambda q, k, h, p: p.n // p.m < k, 0.5),
    "a known remainder": (lambda q, k, h, p: q + p.n % p.m >= k, 0.3),
    "least and largest": (
        lambda q, k, h, p: jnp.minimum(q, k) + 3 >= jnp.maximum(p.m, k - q),
        0.5,
    ),
    "clipped": (lambda q, k, h, p: jnp.clip(q - k, -8, p.m) < 9, 0.5),
    "choice": (lambda q, k, h, p: jnp.where(q > p.m, q - k, k) < p.n, 0.5),
    "least of a choice": (lambda q, k, h, p: jnp.where(q > p.m, q - k, k) > p.n, 0.5),
    "floats": (lambda q, k, h, p: real(q - k) * p.f < 4.0, 0.8),
    "floats that overflow": (lambda q, k, h, p: ~(real(q - k) * p.f * 1e30 > 1e38), 0.2),
    "infinity times zero": (lambda q, k, h, p: ~(real(q - k) / (p.f * 0.0) < 1.0), 0.0),
    "no number beside infinity": (
        lambda q, k, h, p: real(q - k) / (p.f * 0.0) <= 1.0 / (p.f * 0.0),
        0.0,
    ),
    "divided floats": (lambda q, k, h, p: real(k) / 3.0 - real(q) / 3.0 <= p.f, 0.5),
    "to half": (lambda q, k, h, p: (q - k).astype(jnp.float16) < 80.0, 0.5),
    "to whole numbers": (lambda q, k, h, p: (real(q - k) * p.f).astype(jnp.int32) < 10, 0.5),
    "of a bool": (lambda q, k, h, p: (q > k).astype(jnp.int32) + 1 > p.m, 0.5),
    "one that is not known beside": (lambda q, k, h, p: (p.t.key > 0) | (k <= q), 1.0),
    "of a table beside": (lambda q, k, h, p: (p.table & 1 == 1) | (k <= q), 1.0),
    "a tuple": (lambda q, k, h, p: (p.some[0] <= k) | (p.some[1] > q), 0.5),
    "a constant": (lambda q, k, h, p: True, 1.0),
    "a shift of a number": (lambda q, k, h, p: q - k < (p.m << 2), 0.9),
}
ASKED = {
    "remainder": lambda q, k, h, p: (q - k) % p.n == 0,
    "bits": lambda q, k, h, p: (q ^ k) < p.n,
    "shift": lambda q, k, h, p: (k << 3) > p.n,
    "product of both": lambda q, k, h, p: q * k < p.n,
    "by a position": lambda q, k, h, p: q // (k + 1) < p.n,
    "absolute": lambda q, k, h, p: jnp.abs(q - k) < p.n,
    "a curve": lambda q, k, h, p: jnp.sin(real(q - k)) <= 1.0,
    "narrow": lambda q, k, h, p: (q - k).astype(jnp.int8) < 100,
    "without a sign": lambda q, k, h, p: (q - k).astype(jnp.uint32) < 100,
    "a number as a bool": lambda q, k, h, p: (q - k).astype(jnp.bool_),
    "bools compared": lambda q, k, h, p: (q > k) == (k > p.n),
    "bools chosen": lambda q, k, h, p: jnp.where(q > k, k > 3, q > 3),
    "two results": lambda q, k, h, p: (
        jax.lax.while_loop(
            lambda both: both[0] < 2, lambda both: (both[0] + 1, both[1] - 1), (jnp.int32(0), 1 + q)
        )[1]
        < p.n
    ),
    "a token's number": lambda q, k, h, p: p.t.key <= p.t.query,
    "and": lambda q, k, h, p: (k <= q) & (jnp.abs(q - k) < p.n) & (p.t.key > 0),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Any, Any]]:
    return blocks({name: mask for name, (mask, _) in TOLD.items()})


@pytest.mark.parametrize("name", TOLD)
def test_what_is_said_to_be_seen_whole_is(name: str, answers: dict[str, tuple[Any, Any]]) -> None:
    said, is_so = (np.asarray(answer) for answer in answers[name])
    wrong = [CASES[i] for i in np.flatnonzero(said & ~is_so)]
    assert not wrong, wrong[:5]
    assert is_so.any()
    assert said.sum() >= TOLD[name][1] * is_so.sum(), (said.sum(), is_so.sum())


@pytest.mark.parametrize("name", ASKED)
def test_what_intervals_cannot_tell_is_asked(name: str) -> None:
    position, number = jnp.int32(5), jnp.int32(MOST)
    assert told(ASKED[name], position, position, number, number, jnp.float32(0)) in (None, False)
