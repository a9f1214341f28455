"""Whether a variant computes everywhere what its functions say. Used before it serves, by tests and
by whoever writes one; never on the serving path.

A random batch over shuffled pages, with NaN wherever nothing may be read, is attended by the
float32 reference, by plain XLA and by the Hopper kernels: interpreted where asked, and lowered for
CUDA, which needs no GPU.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import xla
from pallas_kernels.attention.decode_config import DecodeConfig
from pallas_kernels.attention.decode_plan import plan_decode
from pallas_kernels.attention.decode_sm90 import paged_decode_sm90
from pallas_kernels.attention.decode_sm90_items import DecodeOp
from pallas_kernels.attention.prefill_problem import PrefillProblem, make_prefill_problem
from pallas_kernels.attention.prefill_sm90 import default_prefill_config, paged_prefill_sm90
from pallas_kernels.attention.prefill_specs import PrefillSpec
from pallas_kernels.attention.prefill_tiles import make_prefill_tiles
from pallas_kernels.attention.reference import modified_scores, paged_attention_reference
from pallas_kernels.attention.variant import AttentionVariant, VariantError
from pallas_kernels.attention.variant_hints import hint_of
from pallas_kernels.attention.variant_params import (
    Params,
    TokenValues,
    default_pairs,
    kv_spans,
    param_arrays,
    query_values,
)
from pallas_kernels.attention.xla_queries import make_tile_map
from pallas_kernels.kv_write.narrow import widened

# A row that decodes, one that goes on with its prompt, one that starts: all cross a block.
SHAPE = PrefillSpec("check", 4, 2, 64, 32, ((150, 1), (90, 33), (0, 40)), 1, 6)
FLOAT32_ERROR = 1e-4  # what rounding may cost, beside the length of the answer
_DECODE = DecodeConfig(split_tokens=128, chunk_tokens=256, stages=2, num_ctas=3)


@dataclass(frozen=True)
class Case:
    """A batch and what its rows bring; ``spec.rows`` are the batch's slots, the last is padding."""

    variant: AttentionVariant
    spec: PrefillSpec
    problem: PrefillProblem
    row_params: Params
    token_pages: Float[Array, "P N K B"] | None = None

    @property
    def tokens(self) -> TokenValues | None:
        if self.token_pages is None:
            return None
        where = (self.problem.block_tables, *_tokens(self.spec))
        return TokenValues(self.token_pages, query_values(self.token_pages, *where))

    @property
    def scale(self) -> float:
        return self.spec.dim**-0.5

    @property
    def rest(self) -> dict[str, Any]:
        return {"scale": self.scale, "variant": self.variant, "row_params": self.row_params}


def make_case(
    variant: AttentionVariant,
    row_values: dict[str, Any] | None = None,
    spec: PrefillSpec = SHAPE,
    dtype: str = "float32",
) -> Case:
    """``row_values``: per param what every row brings, or one entry per row of the spec. Raises
    VariantError for values that do not fit."""
    slots = len(spec.rows) + 1
    brought: Params = {}
    for param in variant.row_params:
        if row_values and param.name in row_values:
            values = row_values[param.name]
            if np.ndim(values) > (param.size is not None):
                values = [*values, values[-1]]
            else:
                values = [values] * slots
            stacked = np.stack([param.check(value, spec.heads) for value in values])
            brought[param.name] = jnp.asarray(stacked)
    problem = make_prefill_problem(spec, dtype)
    return Case(variant, spec, problem, brought, _random_token_pages(variant, spec, problem))


def _random_token_pages(
    variant: AttentionVariant, spec: PrefillSpec, problem: PrefillProblem
) -> Array | None:
    """NaN where nothing has been written."""
    if not variant.token_params:
        return None
    shape = (len(problem.kv), len(variant.token_params), spec.kv_heads, spec.page)
    values = np.random.default_rng(1).standard_normal(shape, np.float32)
    unwritten = np.isnan(np.asarray(widened(problem.kv, jnp.float32))[:, 0, :, :, 0])
    return jnp.asarray(np.where(unwritten[:, None], np.nan, values))


def reference(case: Case) -> Float[Array, "T H D"]:
    """Every token's right answer; zero for padding."""
    spec, problem = case.spec, case.problem
    slots, positions = _tokens(spec)
    # The reference gathers what nobody may read, and masks it.
    kv = jnp.nan_to_num(widened(problem.kv, jnp.float32))
    return paged_attention_reference(
        problem.q,
        kv,
        problem.block_tables,
        slots,
        positions,
        seq_lens=problem.seq_lens,
        token_pages=None if case.token_pages is None else jnp.nan_to_num(case.token_pages),
        **case.rest,
    )


def by_xla(case: Case) -> Float[Array, "T H D"]:
    positions = _tokens(case.spec)[1]
    lens = _decode_lens(case)
    problem, brought = case.problem, case.row_params
    facts: dict[str, Any] = {"variant": case.variant, "scale": case.scale}
    return _xla(problem, lens, positions, brought, case.tokens, **facts)


@functools.partial(jax.jit, static_argnames=("variant", "scale"))
def _xla(
    problem: PrefillProblem,
    decode_lens: Int[Array, " R"],
    positions: Int[Array, " T"],
    row_params: Params,
    tokens: TokenValues | None,
    *,
    variant: AttentionVariant,
    scale: float,
) -> Float[Array, "T H D"]:
    """Jitted by shape and variant, so that batches of the same shape compile once."""
    rest: dict[str, Any] = {"scale": scale, "variant": variant, "row_params": row_params}
    q, kv, tables = problem.q, problem.kv, problem.block_tables
    first = None
    if tokens is not None:
        first = tokens._replace(queries=tokens.queries[: len(decode_lens)])
    decoded = xla.paged_decode(q[: len(decode_lens)], kv, tables, decode_lens, tokens=first, **rest)
    out = jnp.zeros_like(q).at[: decoded.shape[0]].set(decoded)
    tiles = make_tile_map(problem.query_start_loc, problem.num_decode_rows, q.shape[0])
    rest |= {"seq_lens": problem.seq_lens, "tokens": tokens}
    return xla.paged_prefill(q, kv, tables, positions, tiles, out, **rest)


def by_kernels(case: Case, *, interpret: bool) -> tuple[Array, Array]:
    """Decode's answers of the first slots, and prefill's of all tokens. 16-bit cases only."""
    spec, problem = case.spec, case.problem
    rows = len(spec.rows) + 1
    plan = plan_decode(
        _decode_lens(case),
        max_pages=problem.block_tables.shape[1],
        page_size=spec.page,
        num_kv_heads=spec.kv_heads,
        config=_DECODE,
        variant=case.variant,
        num_heads=spec.heads,
        head_dim=spec.dim,
        row_params=case.row_params,
    )
    params = param_arrays(case.variant, spec.heads, rows, case.row_params)
    op = DecodeOp(case.scale, None, case.variant, _DECODE, interpret)
    tables, kv = problem.block_tables, problem.kv
    decoded = paged_decode_sm90(problem.q[:rows], kv, tables, plan, params, case.token_pages, op=op)
    config = default_prefill_config(spec.heads, spec.kv_heads, spec.dim)
    # The interpreter is many times slower with a second thread block.
    config = dataclasses.replace(config, num_ctas=1) if interpret else config
    tiles = make_prefill_tiles(
        problem.query_start_loc, problem.seq_lens, problem.num_decode_rows, spec.tokens, config
    )
    prefilled = paged_prefill_sm90(
        problem.q,
        kv,
        tables,
        tiles,
        jnp.zeros_like(problem.q),
        tokens=case.tokens,
        config=config,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        **case.rest,
    )
    return decoded, prefilled


def why_not_lowered(case: Case) -> str | None:
    """None if both kernels lower for CUDA with the variant in them, else what stands in the way and
    what to use instead."""
    try:
        lower_for_cuda(case)
    except Exception as error:  # whatever a function written elsewhere or Mosaic may raise
        return hint_of(case.variant, error)
    return None


def lower_for_cuda(case: Case) -> str:
    """The text of a program with both kernels."""

    def both(
        problem: PrefillProblem, row_params: Params, token_pages: Array | None
    ) -> tuple[Array, Array]:
        inner = dataclasses.replace(
            case, problem=problem, row_params=row_params, token_pages=token_pages
        )
        return by_kernels(inner, interpret=False)

    traced = jax.jit(both).trace(case.problem, case.row_params, case.token_pages)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _modified(case: Case, row: int, score: float = 0.0) -> tuple[Array, Array]:
    """What becomes of a score by query, head and key of a row, and what is visible."""
    variant, length = case.variant, sum(case.spec.rows[row])
    arrays = param_arrays(variant, case.spec.heads, len(case.spec.rows) + 1, case.row_params)
    facts: dict[str, Any] = {"seq_lens": case.problem.seq_lens}
    facts["tokens"] = default_pairs(variant, case.spec.heads)
    position, rows = jnp.arange(length, dtype=jnp.int32), jnp.full(length, row, jnp.int32)
    scores = jnp.full((length, case.spec.heads, length), score, jnp.float32)
    return modified_scores(scores, rows, position, variant, arrays, **facts)


def not_finite(case: Case) -> str | None:
    """A visible pair whose score becomes NaN or inf, whatever it was. -inf may hide a pair."""
    for score in (0.5, -0.5):
        for row in range(len(case.spec.rows)):
            scores, visible = map(np.asarray, _modified(case, row, score))
            wrong = np.argwhere(visible & ~(scores < np.inf))
            if wrong.size:
                query, head, key = wrong[0]
                return (
                    f"score_mod makes {scores[query, head, key]} of a score of {score}, for query "
                    f"{query} and key {key}"
                )
    return None


def hidden_by_range(case: Case) -> str | None:
    """A key that the variant's kv_range hides from queries that see it, of single ones and of
    tiles: kernels ask with both."""
    variant = case.variant
    arrays = param_arrays(variant, case.spec.heads, len(case.spec.rows) + 1, case.row_params)
    for row, length in enumerate(map(sum, case.spec.rows)):
        position, rows = jnp.arange(length, dtype=jnp.int32), jnp.full(length, row, jnp.int32)
        seen = np.asarray(_modified(case, row)[1].any(axis=1))
        for tile in (1, 64):
            last = jnp.minimum(position + tile - 1, length - 1)
            written = jnp.full(length, length, jnp.int32)
            begin, end = map(np.asarray, kv_spans(variant, arrays, rows, position, last, written))
            for first in range(length):
                keys = np.flatnonzero(seen[first : first + tile].any(axis=0))
                lost = keys[(keys < begin[first]) | (keys >= end[first])]
                if lost.size:
                    return f"it hides key {lost[0]} from queries {first} to {int(last[first])}"
    return None


def check_answers(variant: AttentionVariant) -> None:
    """That attention over random pages, by plain XLA, is what the float32 reference says, and that
    kv_range, of which few pages show little, hides nothing. One to two seconds.

    Raises:
        VariantError: it is not.
    """
    case = make_case(variant)

    def right(problem: PrefillProblem, row_params: Params, token_pages: Array | None) -> Array:
        given = {"problem": problem, "row_params": row_params, "token_pages": token_pages}
        return reference(dataclasses.replace(case, **given))

    want = jax.jit(right)(case.problem, case.row_params, case.token_pages)
    used = case.spec.tokens - case.spec.padding
    error = largest_error(by_xla(case)[:used], want[:used])
    if not error <= FLOAT32_ERROR:  # it may be NaN
        said = not_finite(case) or (
            f"attention over pages is {error:.0e} off the reference. Does a function look at the "
            "shape of what it is given? `jaxllm lab check` says more"
        )
        raise VariantError(f"{variant.name}: {said}")
    if variant.kv_range is not None and (hidden := hidden_by_range(case)) is not None:
        raise VariantError(f"{variant.name}: kv_range must hold all that mask_mod shows: {hidden}")


def largest_error(got: Any, want: Any) -> float:
    """The distance of two answers beside the length of the right one."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def _decode_lens(case: Case) -> Array:
    slots = jnp.arange(len(case.spec.rows) + 1)
    return jnp.where(slots < case.problem.num_decode_rows, case.problem.seq_lens, 0)


def _tokens(spec: PrefillSpec) -> tuple[Array, Array]:
    """Slot and position of every token; -1 for padding."""
    counts = [new for _, new in spec.rows]
    slots = np.repeat(np.arange(len(counts) + 1), [*counts, spec.padding])
    positions = [cached + i for cached, new in spec.rows for i in range(new)]
    padded = [*positions, *[-1] * spec.padding]
    return jnp.asarray(slots, jnp.int32), jnp.asarray(padded, jnp.int32)
