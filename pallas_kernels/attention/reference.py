"""The contract of paged attention, as the shortest float32 program that is right.

Every implementation is compared with it. It gathers whole block tables: never use it to serve.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import OfPair, Params, param_arrays, query_values
from pallas_kernels.kv_write.narrow import widened


def paged_attention_reference(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P S K B D"],
    block_tables: Int[Array, "R M"],
    token_rows: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    scale: float,
    window: int | None = None,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    seq_lens: Int[Array, " R"] | None = None,
    value_dim: int | None = None,
    token_pages: Float[Array, "P N K B"] | None = None,
) -> Float[Array, "T H V"]:
    """Causal attention of token t, at ``positions[t]`` of row ``token_rows[t]``, over its row's
    pages, changed by ``variant``; ``row_params`` is what rows bring of its params.

    ``kv[p, 0]`` holds keys, ``kv[p, 1]`` values; query head h reads KV head ``h // (H / K)``. Where
    S is 1, the first ``value_dim`` channels of a key are its value.
    With ``window`` a query sees itself and the ``window - 1`` tokens before it. ``kv_range`` is not
    asked. ``seq_lens``, how far rows have been written, bounds a variant with lookahead.
    ``token_pages`` holds the variant's per_token params. A position of -1 marks padding, whose
    output is zero. Returns float32.
    """
    weights = attention_probs(
        q,
        kv,
        block_tables,
        token_rows,
        positions,
        scale=scale,
        window=window,
        variant=variant,
        row_params=row_params,
        seq_lens=seq_lens,
        token_pages=token_pages,
    )
    values = _gathered(kv, -1, block_tables, token_rows, q.shape[1])[..., :value_dim]
    values = jnp.where((weights != 0)[..., None], values, 0.0)
    return jnp.einsum("thn,thnd->thd", weights, values)


def attention_probs(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P S K B D"],
    block_tables: Int[Array, "R M"],
    token_rows: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    scale: float,
    window: int | None = None,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    seq_lens: Int[Array, " R"] | None = None,
    token_pages: Float[Array, "P N K B"] | None = None,
) -> Float[Array, "T H N"]:
    """The weights of that attention, float32: of the key at position n of the token's row, for
    ``N = M * B``. What is hidden has zero; with sinks they do not sum to one.
    """
    heads = q.shape[1]
    keys = _gathered(kv, 0, block_tables, token_rows, heads)[..., : q.shape[2]]
    scores = jnp.einsum("thd,thnd->thn", q.astype(jnp.float32), keys) * scale
    arrays = param_arrays(variant, heads, block_tables.shape[0], row_params)
    scores, visible = modified_scores(
        scores,
        token_rows,
        positions,
        variant,
        arrays,
        window=window,
        seq_lens=seq_lens,
        tokens=_token_pairs(variant, token_pages, block_tables, token_rows, positions, heads),
    )
    sink = None if variant.sinks is None else arrays[variant.sinks]
    return masked_softmax(scores, visible, sink)


def masked_softmax(
    scores: Float[Array, "T H N"], visible: Bool[Array, "T H N"], sink: Float[Array, " H"] | None
) -> Float[Array, "T H N"]:
    """Zero where nothing is visible, or all that is scores -inf. ``sink`` is the logit of one more
    key.
    """
    visible &= scores != -jnp.inf
    logits = jnp.where(visible, scores, -jnp.inf)
    if sink is not None:
        more = jnp.broadcast_to(sink[None, :, None], (*logits.shape[:2], 1))
        logits = jnp.concatenate([logits, more], axis=2)
    weights = jax.nn.softmax(logits, axis=-1)[:, :, : scores.shape[2]]
    return jnp.where(visible, weights, 0.0)  # also turns the NaN of an all-masked row to zero


def _gathered(
    kv: Float[Array, "P S K B D"],
    part: int,
    block_tables: Int[Array, "R M"],
    token_rows: Int[Array, " T"],
    heads: int,
) -> Float[Array, "T H N D"]:
    """Keys (part 0), or what values are in (part -1), of each token's row in order of positions,
    float32.
    """
    found = widened(kv[block_tables[token_rows], part], jnp.float32)  # [T, M, K, B, D]
    tokens, _, kv_heads, _, dim = found.shape
    found = found.transpose(0, 2, 1, 3, 4).reshape(tokens, kv_heads, -1, dim)
    return jnp.repeat(found, heads // kv_heads, axis=1)


def modified_scores(
    scores: Float[Array, "T H N"],
    token_rows: Int[Array, " T"],
    positions: Int[Array, " T"],
    variant: AttentionVariant,
    arrays: Params,
    *,
    window: int | None = None,
    seq_lens: Int[Array, " R"] | None = None,
    tokens: Mapping[str, OfPair] | None = None,
) -> tuple[Float[Array, "T H N"], Bool[Array, "T H N"]]:
    """The scores of tokens with positions 0 to N - 1 of their rows as the variant wants them, and
    what is visible. ``arrays`` is ``param_arrays``, ``tokens`` the per_token params as they
    broadcast with the scores, the rest as above.
    """
    q_pos, kv_pos = positions[:, None, None], jnp.arange(scores.shape[2])[None, None]
    head = jnp.arange(scores.shape[1])[None, :, None]
    mods = _params_of(variant, arrays, token_rows, jnp.maximum(q_pos - kv_pos, 0), tokens or {})
    if variant.score_mod is not None:
        # What nobody sees must have gradients too: a logarithm of the distance has none below zero.
        scored = kv_pos if variant.lookahead else jnp.minimum(kv_pos, q_pos)
        changed = variant.score_mod(scores, q_pos, scored, head, mods)
        scores = jnp.broadcast_to(changed, scores.shape)
    if variant.lookahead and seq_lens is not None:
        visible = (q_pos >= 0) & (kv_pos < seq_lens[token_rows][:, None, None])
    else:
        visible = kv_pos <= q_pos
    if window is not None:
        visible &= kv_pos > q_pos - window
    if variant.mask_mod is not None:
        visible = visible & variant.mask_mod(q_pos, kv_pos, head, mods)
    return scores, jnp.broadcast_to(visible, scores.shape)


def _token_pairs(
    variant: AttentionVariant,
    pages: Float[Array, "P N K B"] | None,
    block_tables: Int[Array, "R M"],
    rows: Int[Array, " T"],
    positions: Int[Array, " T"],
    heads: int,
) -> dict[str, OfPair]:
    if pages is None:
        return {}
    groups = heads // pages.shape[2]
    query = query_values(pages, block_tables, rows, positions)  # [T, N, K]
    key = jnp.moveaxis(pages[block_tables[rows]], 1, 3)  # [T, N, K, M, B]
    key = jnp.repeat(key.reshape(*key.shape[:3], -1), groups, axis=2)
    query = jnp.repeat(query, groups, axis=2)[..., None]
    named = enumerate(variant.token_params)
    return {param.name: OfPair(query[:, i], key[:, i]) for i, param in named}


def _params_of(
    variant: AttentionVariant,
    params: Params,
    rows: Int[Array, " T"],
    distance: Int[Array, "T 1 N"],
    tokens: Mapping[str, OfPair],
) -> SimpleNamespace:
    """The params as they broadcast with scores [T, H, N]."""
    shaped: dict[str, Array | tuple[Array, ...]] = dict(tokens)
    for param in variant.array_params:
        value = params[param.name]
        match param.kind:
            case "per_head":
                value = value[None, :, None]
            case "per_distance":
                value = jnp.moveaxis(
                    value[:, jnp.minimum(distance[:, 0], value.shape[1] - 1)], 0, 1
                )
            case "per_row" if param.size is None:
                value = value[rows][:, None, None]
            case "per_row":
                value = tuple(value[rows, i][:, None, None] for i in range(param.size or 0))
            case "per_layer":
                pass
        shaped[param.name] = value
    return SimpleNamespace(**shaped)
