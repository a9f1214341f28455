"""Paged decode, to be timed and tuned: bytes of keys and values per second."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import xla
from pallas_kernels.attention.api import paged_decode
from pallas_kernels.attention.decode_config import (
    DecodeConfig,
    default_decode_config,
    refuses_decode_sm90,
)
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_problem import make_decode_problem, right_answer
from pallas_kernels.attention.decode_specs import MIXED, SMALL, SPEED, DecodeSpec
from pallas_kernels.attention.variant_params import TokenValues, query_values
from pallas_kernels.bench.operation import XLA_CALLS, Operation, Timed
from pallas_kernels.kv_write.narrow import narrow

CALLS = 32  # per dispatch, as the layers of a model
CACHE_BYTES = 1 << 29  # of the different caches of one chain: far more than L2


class DecodeOperation(Operation[DecodeSpec, DecodeConfig]):
    name, unit, speed, small = "decode", "byte", SPEED, SMALL

    def label(self, spec: DecodeSpec) -> str:
        return spec.name

    def amount(self, spec: DecodeSpec) -> int:
        return spec.kv_bytes

    def default(self, spec: DecodeSpec) -> DecodeConfig:
        facts = (spec.stored, spec.page, spec.heads // spec.groups)
        itemsize = jnp.dtype(spec.pages).itemsize
        return default_decode_config(*facts, itemsize=itemsize, value_dim=spec.value_dim)

    def grid(self, default: DecodeConfig, num_sms: int) -> Sequence[dict[str, Any]]:
        tried = [(default.stages, default.num_ctas), (3, 2 * num_sms), (2, 2 * num_sms)]
        tried += [(4, num_sms), (6, num_sms), (3, 8 * num_sms)]
        return [{"stages": stages, "num_ctas": ctas} for stages, ctas in dict.fromkeys(tried)]

    def refuses(self, spec: DecodeSpec, config: DecodeConfig, platform: str) -> str | None:
        facts = (spec.heads, spec.kv_heads, spec.stored, spec.page, "bfloat16")
        numbers = len(spec.variant.token_params)
        return refuses_decode_sm90(*facts, platform, config, spec.pages, numbers, spec.value_dim)

    def timed(self, spec: DecodeSpec, config: DecodeConfig | None) -> Timed:
        calls = XLA_CALLS if config is None else CALLS
        q, caches, tables, lens = decode_inputs(spec, calls)
        numbers = _token_values(spec, caches[0], tables, lens)
        scale = spec.dim**-0.5

        def attend(q: jax.Array, kv: jax.Array, plan: DecodePlan | None) -> jax.Array:
            rest = (q, kv, tables, lens)
            if config is None:
                mods: dict[str, Any] = {"window": spec.window, "variant": spec.variant}
                mods |= {"tokens": numbers, "value_dim": spec.value_dim}
                return xla.paged_decode(*rest, scale=scale, **mods)
            return _kernel(spec, rest, config, plan, numbers)

        # The plan is made once per step and shared by the layers: not part of what is timed.
        plan = None if config is None else _plan(spec, lens, config)

        def chain(q: jax.Array, caches: tuple[jax.Array, ...], plan: Any) -> jax.Array:
            for i in range(calls):
                q = attend(q, caches[i % len(caches)], plan)
            return q

        def one_after_the_other(queries: Any, caches: Any, plan: Any) -> list[jax.Array]:
            """Where answers are no queries: those of latents have fewer channels."""
            found: list[jax.Array] = []
            for i, own in enumerate(queries):
                own = lax.optimization_barrier((own, *found[-1:]))[0]
                found.append(attend(own, caches[i % len(caches)], plan))
            return found

        if spec.value_dim:
            queries = tuple(q + i for i in range(calls))
            program = jax.jit(one_after_the_other)
            return Timed(lambda: program(queries, caches, plan), calls)
        program = jax.jit(chain)
        return Timed(lambda: program(q, caches, plan), calls)

    def checker(self) -> Callable[[DecodeConfig], str | None]:
        spec = MIXED[0]
        problem = make_decode_problem(spec)
        want = np.asarray(right_answer(spec, problem, spec.dim**-0.5))
        norms = np.maximum(np.linalg.norm(want, axis=(1, 2)), 1e-9)

        def wrong(config: DecodeConfig) -> str | None:
            plan = _plan(spec, problem.seq_lens, config)
            got = np.asarray(_kernel(spec, tuple(problem), config, plan), np.float32)
            error = (np.linalg.norm(got - want, axis=(1, 2)) / norms).max()
            return None if error < 1e-2 else f"the worst row is {error:.1e} off"

        return wrong


def decode_inputs(
    spec: DecodeSpec, calls: int
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Queries, as many caches as ``calls`` can use, block tables over shuffled pages, lengths."""
    used = [-(-length // spec.page) for length in spec.lens]
    pages = np.random.default_rng(0).permutation(sum(used)).astype(np.int32) + 1
    tables = np.zeros((len(used), spec.width), np.int32)
    for row, (count, end) in enumerate(zip(used, np.cumsum(used), strict=True)):
        tables[row, :count] = pages[end - count : end]
    sets = min(calls, max(2, CACHE_BYTES // spec.kv_bytes))
    keys = jax.random.split(jax.random.key(0), sets + 1)
    shape = (sum(used) + 1, spec.parts, spec.kv_heads, spec.page, spec.stored)
    make = jax.jit(lambda key: narrow(jax.random.normal(key, shape, jnp.bfloat16), spec.pages))
    q = jax.random.normal(keys[-1], (len(used), spec.heads, spec.dim), jnp.bfloat16)
    caches = tuple(make(key) for key in keys[:sets])
    return q, caches, jnp.asarray(tables), jnp.asarray(spec.lens, jnp.int32)


def _plan(spec: DecodeSpec, seq_lens: jax.Array, config: DecodeConfig) -> DecodePlan:
    return plan_decode(
        seq_lens,
        max_pages=spec.width,
        page_size=spec.page,
        num_kv_heads=spec.groups,
        window=spec.window,
        config=config,
        variant=spec.variant,
        num_heads=spec.heads,
        head_dim=spec.stored,
    )


def _token_values(
    spec: DecodeSpec, kv: jax.Array, tables: jax.Array, lens: jax.Array
) -> TokenValues | None:
    count = len(spec.variant.token_params)
    if not count:
        return None
    pages = jax.random.normal(jax.random.key(1), (kv.shape[0], count, *kv.shape[2:4]))
    rows = jnp.arange(len(lens), dtype=jnp.int32)
    return TokenValues(pages, query_values(pages, tables, rows, lens - 1))


def _kernel(
    spec: DecodeSpec,
    rest: tuple[jax.Array, ...],
    config: DecodeConfig,
    plan: DecodePlan | None,
    numbers: TokenValues | None = None,
) -> jax.Array:
    q, kv, tables, lens = rest
    return paged_decode(
        q,
        kv,
        tables,
        lens,
        scale=spec.dim**-0.5,
        platform="sm_90",
        window=spec.window,
        variant=spec.variant,
        tokens=numbers,
        config=config,
        plan=plan,
        value_dim=spec.value_dim,
    )
