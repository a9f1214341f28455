"""The contract of paged attention, as the shortest float32 program that is right.

Every implementation is compared with it. It gathers whole block tables: never use it to serve.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def paged_attention_reference(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    token_rows: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "T H D"]:
    """Causal attention of token t, at ``positions[t]`` of row ``token_rows[t]``, over its row's
    pages.

    ``kv[p, 0]`` holds keys, ``kv[p, 1]`` values; query head h reads KV head ``h // (H / K)``.
    With ``window`` a query sees itself and the ``window - 1`` tokens before it.
    A position of -1 marks padding, whose output is zero. Returns float32.
    """
    tokens, heads, dim = q.shape
    groups = heads // kv.shape[2]
    gathered = kv[block_tables[token_rows]].astype(jnp.float32)  # [T, M, 2, K, B, D]
    gathered = gathered.transpose(2, 0, 3, 1, 4, 5).reshape(2, tokens, kv.shape[2], -1, dim)
    keys, values = jnp.repeat(gathered, groups, axis=2)  # [T, H, M * B, D] each
    scores = jnp.einsum("thd,thnd->thn", q.astype(jnp.float32), keys) * scale
    kv_pos = jnp.arange(keys.shape[2])[None]
    visible = kv_pos <= positions[:, None]
    if window is not None:
        visible &= kv_pos > positions[:, None] - window
    visible = visible[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    weights = jnp.where(visible, weights, 0.0)  # also turns the NaN of an all-masked row to zero
    values = jnp.where(visible[..., None], values, 0.0)
    return jnp.einsum("thn,thnd->thd", weights, values)
