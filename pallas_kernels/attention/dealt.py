"""Which items of a list are this thread block's."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Dealt:
    """The list falls in cost; dealing it back and forth to a persistent grid evens out the sums."""

    def __init__(self, total: Array, num_ctas: int):
        """``total``: items in the list; the grid's axis is called "cta"."""
        self._cta, self._ctas = lax.axis_index("cta"), jnp.int32(num_ctas)
        rounds, rest = lax.div(total, self._ctas), lax.rem(total, self._ctas)
        one_more = self._place(rounds) < rest
        self.count = rounds + jnp.where(one_more, jnp.int32(1), jnp.int32(0))

    def __call__(self, turn: Array) -> Array:
        """Its item of a turn; past the list's end if it has none left."""
        return turn * self._ctas + self._place(turn)

    def _place(self, turn: Array) -> Array:
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, self._cta, self._ctas - 1 - self._cta)
