"""A random batch of a DecodeSpec and its right answer, for tests and benchmarks. Never served.

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

from pallas_kernels.attention.decode_specs import DecodeSpec
from pallas_kernels.kv_write.narrow import narrow, widened


class DecodeProblem(NamedTuple):
    q: Float[Array, "R H D"]
    kv: Float[Array, "P S K B D"]
    block_tables: Int[Array, "R M"]
    seq_lens: Int[Array, " R"]


def make_decode_problem(spec: DecodeSpec, seed: int = 0) -> DecodeProblem:
    """Queries in bfloat16, pages as the spec has them."""
    rng = np.random.default_rng(seed)
    lens = np.array(spec.lens, np.int32)
    used = -(-lens // spec.page)
    sizes = (1 + used.sum() + 3, spec.parts, spec.kv_heads, spec.page, spec.dim)
    kv = np.full(sizes, np.nan, np.float32)
    kv[1:] = rng.standard_normal(kv[1:].shape, np.float32)
    kv = np.pad(kv, [(0, 0)] * 4 + [(0, spec.stored - spec.dim)])
    pages = iter(rng.permutation(len(kv) - 1) + 1)
    tables = np.zeros((len(lens), spec.width), np.int32)
    for row, count in enumerate(used):
        tables[row, :count] = [next(pages) for _ in range(count)]
        if lens[row] % spec.page:
            kv[tables[row, count - 1], :, :, lens[row] % spec.page :] = np.nan
    q = rng.standard_normal((len(lens), spec.heads, spec.dim), np.float32)
    return DecodeProblem(
        jnp.asarray(q, jnp.bfloat16),
        narrow(jnp.asarray(kv), spec.pages),
        jnp.asarray(tables),
        jnp.asarray(lens),
    )


@partial(jax.jit, static_argnames=("spec", "scale"))
def right_answer(spec: DecodeSpec, problem: DecodeProblem, scale: float) -> Float[Array, "R H V"]:
    """Dense float32 attention, row by row; padding rows are zero."""
    value_dim = spec.value_dim or spec.dim
    out = jnp.zeros((*problem.q.shape[:2], value_dim), jnp.float32)
    for row, length in enumerate(spec.lens):
        if length == 0:
            continue
        table = problem.block_tables[row, : -(-length // spec.page)]
        own = widened(problem.kv[table][..., : spec.dim], jnp.float32)
        pages = jnp.moveaxis(own, 0, 2)  # [S, K, pages, B, D]
        begin = 0 if spec.window is None else max(length - spec.window, 0)
        dense = pages.reshape(spec.parts, spec.kv_heads, -1, spec.dim)[:, :, begin:length]
        queries = problem.q[row].astype(jnp.float32).reshape(spec.kv_heads, -1, spec.dim)
        scores = jnp.einsum("kgd,knd->kgn", queries, dense[0], precision="highest") * scale
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        weights = nn.softmax(scores, axis=-1)
        answer = jnp.einsum(
            "kgn,knd->kgd", weights, dense[-1, ..., :value_dim], precision="highest"
        )
        out = out.at[row].set(answer.reshape(spec.heads, value_dim))
    return out
