"""Scores of latents in the decode kernel, made by two consumers together.

A wgmma of few columns takes as long as its left operand takes to be read from shared memory. So
each consumer multiplies the channels that it sums later, hands the products to the other, and both
add them up in one order. What of a key is no value both multiply.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_items import DecodeShape
from pallas_kernels.attention.decode_sm90_sums import WGMMA, Ref

_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def shared_scores(
    shape: DecodeShape, smem: dict[str, Ref], keys: Ref, queries: Ref, consumer: Array, step: Array
) -> Array:
    """[tokens, heads], float32, of a block of keys [tokens, D] and queries [heads, D].

    There are two places for what is handed over, used in turn, each with a barrier per consumer:
    who comes back to one has waited for the other's products in between, which the other handed
    over after it had waited and read here.
    """
    own, rest = shape.columns_of(consumer), pl.ds(shape.answer_dim, shape.dim - shape.answer_dim)

    def multiply(of_own: Ref, *of_rest: Ref) -> tuple[Array, ...]:
        plgpu.wgmma(of_own, keys.at[:, *own], queries.at[:, *own].transpose((1, 0)))
        for result in of_rest:
            plgpu.wgmma(result, keys.at[:, rest], queries.at[:, rest].transpose((1, 0)))
        return of_own[...], *(result[...] for result in of_rest)

    result = _Accumulator((shape.block, shape.padded), jnp.float32)
    count = 2 if rest.size else 1
    mine, *more = pl.run_scoped(multiply, *[result] * count)
    turn = lax.rem(step, jnp.int32(2))
    place = smem["scores"].at[turn]
    place.at[consumer][...] = mine
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem["scores_full"].at[2 * turn + 1 - consumer])
    plgpu.barrier_wait(smem["scores_full"].at[2 * turn + consumer])
    first, second = (plgpu.load(place.at[i], layout=WGMMA, optimized=False) for i in range(2))
    return sum(more, first + second)
