"""Reductions across the warps of a consumer of the decode kernel, and whose turn it is where there
are two consumers.

Mosaic keeps one scratch in shared memory per thread block for them, not one per warpgroup, so two
that reduce at once would mix their numbers. The interpreter has no scratch and shows nothing.
"""

from collections.abc import Callable

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_sums import Ref

Reduction = Callable[..., Array]  # jnp.max, jnp.sum


class Reductions:
    """Of one consumer. ``turn``: a barrier for each of two consumers, which must reduce equally
    often; None where there is one."""

    def __init__(self, turn: Ref, consumer: Array):
        self._turn, self._consumer = turn, consumer
        if turn is not None:  # the first one begins
            pl.when(consumer == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

    def over_tokens(self, reduce: Reduction, tile: Array) -> Array:
        """[tokens, heads] to [heads]."""
        if self._turn is None:
            return reduce(tile, axis=0)
        plgpu.barrier_wait(self._turn.at[self._consumer])
        reduced = reduce(tile, axis=0)
        plgpu.barrier_arrive(self._turn.at[1 - self._consumer])
        return reduced

    def end(self) -> None:
        """Every arrival must have been waited for before the barriers go away."""
        if self._turn is not None:
            pl.when(self._consumer == 0)(lambda: plgpu.barrier_wait(self._turn.at[0]))
