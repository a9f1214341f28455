"""A random batch of a PrefillSpec and its right answer, for tests and benchmarks. Never served.

Pages are shuffled; the null page and everything past a row's end are NaN, because what a kernel
must not read has to hurt.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.prefill_specs import PrefillSpec
from pallas_kernels.kv_write.narrow import narrow, widened


class PrefillProblem(NamedTuple):
    q: Float[Array, "T H D"]
    kv: Float[Array, "P S K B D"]
    block_tables: Int[Array, "R M"]
    query_start_loc: Int[Array, " R1"]
    seq_lens: Int[Array, " R"]
    num_decode_rows: Int[Array, ""]


def make_prefill_problem(
    spec: PrefillSpec, dtype: str = "bfloat16", seed: int = 0
) -> PrefillProblem:
    """The rows of the spec and one padding slot."""
    rng = np.random.default_rng(seed)
    lens = np.array([cached + new for cached, new in spec.rows] + [0], np.int32)
    used = -(-lens // spec.page)
    width = int(used.max())
    sizes = (1 + used.sum() + 3, spec.parts, spec.kv_heads, spec.page, spec.dim)
    kv = np.full(sizes, np.nan, np.float32)
    kv[1:] = rng.standard_normal(kv[1:].shape, np.float32)
    kv = np.pad(kv, [(0, 0)] * 4 + [(0, spec.stored - spec.dim)])
    pages = iter(rng.permutation(len(kv) - 1) + 1)
    tables = np.zeros((len(lens), width), np.int32)
    for row, count in enumerate(used):
        tables[row, :count] = [next(pages) for _ in range(count)]
        if lens[row] % spec.page:
            kv[tables[row, count - 1], :, :, lens[row] % spec.page :] = np.nan
    starts = np.cumsum([0, *(new for _, new in spec.rows), 0]).astype(np.int32)
    q = rng.standard_normal((spec.tokens, spec.heads, spec.dim), np.float32)
    return PrefillProblem(
        jnp.asarray(q, dtype),
        narrow(jnp.asarray(kv), spec.pages or dtype),
        jnp.asarray(tables),
        jnp.asarray(starts),
        jnp.asarray(lens),
        jnp.int32(spec.decode_rows),
    )


@partial(jax.jit, static_argnames=("spec", "scale"))
def right_answer(spec: PrefillSpec, problem: PrefillProblem, scale: float) -> Float[Array, "T H V"]:
    """Dense float32 attention of the prefill rows; decode tokens and padding are zero."""
    value_dim = spec.value_dim or spec.dim
    out = jnp.zeros((*problem.q.shape[:2], value_dim), jnp.float32)
    starts = np.cumsum([0, *(new for _, new in spec.rows)])
    for row, (cached, new) in enumerate(spec.rows):
        if row < spec.decode_rows:
            continue
        start, length = starts[row], cached + new
        table = problem.block_tables[row, : -(-length // spec.page)]
        own = widened(problem.kv[table][..., : spec.dim], jnp.float32)
        pages = jnp.moveaxis(own, 0, 2)  # [S, K, pages, B, D]
        dense = pages.reshape(spec.parts, spec.kv_heads, -1, spec.dim)[:, :, :length]
        heads = jnp.repeat(dense, spec.heads // spec.kv_heads, axis=1)
        keys, values = heads[0], heads[-1, ..., :value_dim]
        queries = problem.q[start : start + new].astype(jnp.float32)
        scores = jnp.einsum("thd,hnd->htn", queries, keys, precision="highest") * scale
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        ahead = jnp.arange(length)[None] - (cached + jnp.arange(new))[:, None]
        visible = ahead <= 0
        if spec.window is not None:
            visible &= ahead > -spec.window
        weights = nn.softmax(jnp.where(visible[None], scores, -jnp.inf), axis=-1)
        answer = jnp.einsum("htn,hnd->thd", weights, values, precision="highest")
        out = out.at[start : start + new].set(answer)
    return out
