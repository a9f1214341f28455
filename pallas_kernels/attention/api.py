"""Paged attention: the kernel where it takes the shape, plain XLA elsewhere."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.attention import xla
from pallas_kernels.attention.decode_config import (
    DecodeConfig,
    default_decode_config,
    head_groups,
    refuses_decode_sm90,
)
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_sm90 import paged_decode_sm90
from pallas_kernels.attention.decode_sm90_items import DecodeOp
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import Params, TokenValues, param_arrays
from pallas_kernels.head_dims import cut_heads


def paged_decode(
    q: Float[Array, "R H D"],
    kv: Float[Array, "P S K B W"],
    block_tables: Int[Array, "R M"],
    seq_lens: Int[Array, " R"],
    *,
    scale: float,
    platform: str,
    window: int | None = None,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    tokens: TokenValues | None = None,
    config: DecodeConfig | None = None,
    plan: DecodePlan | None = None,
    value_dim: int | None = None,
) -> Float[Array, "R H V"]:
    """One query per row, at position ``seq_lens - 1``, over the row's pages.

    Rows with seq_len 0 return zeros. With ``window`` a query sees itself and the ``window - 1``
    tokens before it. ``row_params`` is what rows bring of the variant's params, see
    ``param_arrays``, ``tokens`` its per_token params. ``platform`` is ``"sm_90"`` for Hopper; every
    other value takes XLA. ``plan`` is ``plan_decode`` of the same lengths, window, variant and
    config: layers that share it compute it once. Pages may hold wider heads than the queries, with
    zeros behind. With ``value_dim`` they hold keys alone (S is 1), whose first so many channels are
    the values; otherwise V is D.
    """
    heads = q.shape[1]
    kv_heads, page_size, dim = kv.shape[2:]
    groups = head_groups(heads, kv_heads, value_dim)
    config = config or default_decode_config(
        dim, page_size, heads // groups, itemsize=kv.dtype.itemsize, value_dim=value_dim
    )
    facts = (heads, kv_heads, dim, page_size, str(q.dtype), platform, config)
    numbers = len(variant.token_params)
    reason = refuses_decode_sm90(*facts, str(kv.dtype), numbers, value_dim)
    if reason is None:
        if plan is None:
            plan = plan_decode(
                seq_lens,
                max_pages=block_tables.shape[1],
                page_size=page_size,
                num_kv_heads=groups,
                window=window,
                config=config,
                variant=variant,
                num_heads=heads,
                head_dim=dim,
                row_params=row_params,
            )
        op = DecodeOp(scale, window, variant, config, value_dim=value_dim)
        params = param_arrays(variant, heads, q.shape[0], row_params)
        pages = None if tokens is None else tokens.pages
        return paged_decode_sm90(q, kv, block_tables, plan, params, pages, op=op)
    rest: dict[str, Any] = {"variant": variant, "row_params": row_params, "tokens": tokens}
    rest["value_dim"] = value_dim
    kv = cut_heads(kv, q.shape[2])
    return xla.paged_decode(q, kv, block_tables, seq_lens, scale=scale, window=window, **rest)
