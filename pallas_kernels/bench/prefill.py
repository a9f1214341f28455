"""Chunked prefill, to be timed and tuned: multiply-adds of unmasked pairs per second."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import xla
from pallas_kernels.attention.latent_prefill_sm90 import (
    LATENT_TILES,
    make_latent_tiles,
    paged_latent_prefill_sm90,
    refuses_latent_prefill_sm90,
)
from pallas_kernels.attention.page_map import prefill_map
from pallas_kernels.attention.prefill_problem import (
    PrefillProblem,
    make_prefill_problem,
    right_answer,
)
from pallas_kernels.attention.prefill_sm90 import (
    default_prefill_config,
    paged_prefill_sm90,
    refuses_prefill_sm90,
)
from pallas_kernels.attention.prefill_specs import (
    MIXED,
    SMALL,
    SPEED,
    SPEED_SMALL_PAGES,
    PrefillSpec,
)
from pallas_kernels.attention.prefill_tiles import PrefillConfig, make_prefill_tiles
from pallas_kernels.attention.variant_params import TokenValues, query_values
from pallas_kernels.attention.xla_queries import make_tile_map
from pallas_kernels.attention.xla_spans import Sight
from pallas_kernels.bench.operation import XLA_CALLS, Operation, Timed
from pallas_kernels.kv_write.narrow import narrow

CALLS = 8  # per dispatch; one takes a millisecond


class PrefillOperation(Operation[PrefillSpec, PrefillConfig]):
    name, unit, speed, small = "prefill", "flop", SPEED, SMALL

    def label(self, spec: PrefillSpec) -> str:
        return spec.name

    def amount(self, spec: PrefillSpec) -> int:
        return spec.flops

    def default(self, spec: PrefillSpec) -> PrefillConfig:
        if spec.value_dim is not None:
            return LATENT_TILES
        return default_prefill_config(spec.heads, spec.kv_heads, spec.dim)

    def where(self, spec: PrefillSpec) -> dict[str, Any]:
        """Small pages are many copies, which more warps than one may deal out."""
        return {"page": spec.page, "dim": spec.stored} if spec.page < 64 else {}

    @property
    def tuned_on(self) -> Sequence[PrefillSpec]:
        return (*self.speed, *SPEED_SMALL_PAGES)

    def grid(self, default: PrefillConfig, num_sms: int) -> Sequence[dict[str, Any]]:
        def fields(heads: int, ctas: int, turns: bool, issuers: int = 1) -> dict[str, Any]:
            tiles = {"heads_per_tile": heads, "num_ctas": ctas, "take_turns": turns}
            return tiles | {"issuers": issuers}

        own, turns = (default.heads_per_tile, default.num_ctas), default.take_turns
        tried = [fields(*own, turns), fields(own[0], num_sms, turns)]
        # 1 suits every group, 2 an even one; 4096: as many thread blocks as tiles, or nearly.
        tried += [fields(1, num_sms, turns), fields(own[0], 4096, turns)]
        tried += [fields(*own, not turns), fields(*own, turns, 2), fields(*own, turns, 4)]
        return [item for index, item in enumerate(tried) if item not in tried[:index]]

    def refuses(self, spec: PrefillSpec, config: PrefillConfig, platform: str) -> str | None:
        heads, where = (spec.heads, spec.kv_heads, spec.stored), (platform, spec.pages)
        if spec.value_dim is not None:
            dims = (*heads, spec.value_dim, spec.page)
            return refuses_latent_prefill_sm90(*dims, "bfloat16", *where)
        return refuses_prefill_sm90(*heads, spec.page, "bfloat16", *where)

    def xla_refuses(self, spec: PrefillSpec) -> str | None:
        return None if self.amount(spec) else "there is nothing to attend"

    def timed(self, spec: PrefillSpec, config: PrefillConfig | None) -> Timed:
        calls = XLA_CALLS if config is None else CALLS
        queries, problem = prefill_inputs(spec, calls)
        attend = _attend_xla if config is None else _attend_kernel

        def program(queries: tuple[jax.Array, ...], problem: PrefillProblem) -> list[jax.Array]:
            return attend(spec, config, queries, problem)

        compiled = jax.jit(program)
        return Timed(lambda: compiled(queries, problem), calls)

    def checker(self) -> Callable[[PrefillConfig], str | None]:
        spec = MIXED[0]
        problem = make_prefill_problem(spec)
        own = slice(spec.decode_rows, None)  # nothing is written to what decode rows are given
        want = np.asarray(right_answer(spec, problem, spec.dim**-0.5))[own]

        def wrong(config: PrefillConfig) -> str | None:
            answers = _attend_kernel(spec, config, (problem.q,), problem)[0]
            got = np.asarray(answers, np.float32)[own]
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            return None if error < 1e-2 else f"the answers are {error:.1e} off"

        return wrong


def prefill_inputs(spec: PrefillSpec, calls: int) -> tuple[tuple[jax.Array, ...], PrefillProblem]:
    """Queries of every call, and a problem made on the device, with no NaN in it."""
    lens = np.array([cached + new for cached, new in spec.rows] + [0], np.int32)
    used = -(-lens // spec.page)
    pages = np.random.default_rng(0).permutation(used.sum()).astype(np.int32) + 1
    tables = np.zeros((len(lens), used.max()), np.int32)
    for row, (count, end) in enumerate(zip(used, np.cumsum(used), strict=True)):
        tables[row, :count] = pages[end - count : end]
    starts = np.cumsum([0, *(new for _, new in spec.rows), 0]).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), calls + 1)
    shape = (spec.tokens, spec.heads, spec.dim)
    queries = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
    cache = (1 + int(used.sum()), spec.parts, spec.kv_heads, spec.page, spec.stored)
    problem = PrefillProblem(
        queries[0],
        narrow(jax.random.normal(keys[0], cache, jnp.bfloat16), spec.pages or jnp.bfloat16),
        jnp.asarray(tables),
        jnp.asarray(starts),
        jnp.asarray(lens),
        jnp.int32(spec.decode_rows),
    )
    return queries, problem


def _attend_kernel(
    spec: PrefillSpec,
    config: PrefillConfig | None,
    queries: tuple[jax.Array, ...],
    problem: PrefillProblem,
) -> list[jax.Array]:
    """One call per array of queries, on the same cache and tile map."""
    _, kv, tables, starts, lens, num_decode_rows = problem
    if spec.value_dim is not None:
        batch, scale = (starts, lens, num_decode_rows, spec.tokens), spec.dim**-0.5
        tiles = make_latent_tiles(*batch, spec.heads)
        empty = jnp.empty((spec.tokens, spec.heads, spec.value_dim), queries[0].dtype)
        where = (kv, tables, tiles, empty)
        return [paged_latent_prefill_sm90(q, *where, scale=scale) for q in queries]
    config = config or PrefillConfig()
    tiles = make_prefill_tiles(starts, lens, num_decode_rows, spec.tokens, config)
    rest: dict[str, Any] = {"scale": spec.dim**-0.5, "window": spec.window}
    rest |= {"variant": spec.variant, "config": config}
    rest["tokens"] = _token_values(spec, problem)
    if spec.variant.is_mapped:
        sight = Sight(spec.window, spec.variant, None, spec.page, tables.shape)
        rest["page_map"] = prefill_map(tiles, spec.heads, sight, config)
    return [paged_prefill_sm90(q, kv, tables, tiles, jnp.empty_like(q), **rest) for q in queries]


def _attend_xla(
    spec: PrefillSpec,
    config: PrefillConfig | None,
    queries: tuple[jax.Array, ...],
    problem: PrefillProblem,
) -> list[jax.Array]:
    _, kv, tables, starts, lens, num_decode_rows = problem
    _, positions = _tokens(spec, problem)
    tiles = make_tile_map(starts, num_decode_rows, spec.tokens)
    group = 1 if jax.default_backend() == "cpu" else 8
    rest: dict[str, Any] = {"scale": spec.dim**-0.5, "window": spec.window, "group": group}
    rest |= {"variant": spec.variant, "seq_lens": lens, "value_dim": spec.value_dim}
    rest["tokens"] = _token_values(spec, problem)
    empty = jnp.zeros((spec.tokens, spec.heads, spec.value_dim or spec.dim), queries[0].dtype)
    return [xla.paged_prefill(q, kv, tables, positions, tiles, empty, **rest) for q in queries]


def _tokens(spec: PrefillSpec, problem: PrefillProblem) -> tuple[jax.Array, jax.Array]:
    """Row and position of every token."""
    starts, lens = problem.query_start_loc, problem.seq_lens
    token = jnp.arange(spec.tokens, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(starts[1:], token, side="right"), lens.shape[0] - 1)
    return row, (lens - starts[1:])[row] + token


def _token_values(spec: PrefillSpec, problem: PrefillProblem) -> TokenValues | None:
    count = len(spec.variant.token_params)
    if not count:
        return None
    shape = (problem.kv.shape[0], count, *problem.kv.shape[2:4])
    pages = jax.random.normal(jax.random.key(1), shape)
    where = (problem.block_tables, *_tokens(spec, problem))
    return TokenValues(pages, query_values(pages, *where))
