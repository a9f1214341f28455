"""Attention in plain XLA: runs on every platform, and is what kernels are compared with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.attention.backend import (
    AttentionSpec,
    AttentionTarget,
    HeadTransform,
    SlotMapping,
)
from jaxllm.attention.metadata import AttentionMetadata
from jaxllm.config.plan import BatchKind
from pallas_kernels.attention.xla import TileMap, make_tile_map, paged_decode, paged_prefill
from pallas_kernels.kv_write.xla import rope_and_write_xla

# Tiles attended at once: a CPU works on one after the other, an accelerator wants many.
_CPU_TILES, _ACCELERATOR_TILES = 1, 64


class _Prepared(NamedTuple):
    tiles: TileMap | None  # None in a pure decode step


class XLABackend:
    name = "xla"

    def on(self, target: AttentionTarget) -> "XLABackend":
        return self

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        return None

    def cache_head_dim(self, head_dim: int) -> int:
        return head_dim

    def prepare(
        self,
        metadata: AttentionMetadata,
        kind: BatchKind,
        specs: tuple[AttentionSpec, ...],
        page_size: int,
    ) -> _Prepared:
        if kind is BatchKind.DECODE:
            return _Prepared(None)
        return _Prepared(
            make_tile_map(
                metadata.query_start_loc, metadata.num_decode_rows, metadata.positions.shape[0]
            )
        )

    def write(
        self,
        qkv: Float[Array, "T C"],
        kv: Float[Array, "P 2 K B D"],
        slots: SlotMapping,
        heads: HeadTransform,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "P 2 K B D"]]:
        return rope_and_write_xla(
            qkv,
            heads.cos,
            heads.sin,
            slots.pages,
            slots.offsets,
            kv,
            heads.q_norm,
            heads.k_norm,
            eps=heads.eps,
            interleaved=heads.interleaved,
        )

    def attend(
        self,
        q: Float[Array, "T H D"],
        kv: Float[Array, "P 2 K B D"],
        metadata: AttentionMetadata,
        shared: _Prepared,
        spec: AttentionSpec,
    ) -> Float[Array, "T H D"]:
        rows = metadata.seq_lens.shape[0]
        in_decode = jnp.arange(rows) < metadata.num_decode_rows
        decode_lens = jnp.where(in_decode, metadata.seq_lens, 0)
        decoded = paged_decode(
            q[:rows],
            kv,
            metadata.block_tables,
            decode_lens,
            scale=spec.scale,
            window=spec.window,
            variant=spec.variant,
            row_params=metadata.row_params,
        )
        if shared.tiles is None:
            return decoded
        # Decode rows are the first slots, so token i is slot i; the tiles fill in the rest.
        out = jnp.zeros_like(q)
        out = jax.lax.dynamic_update_slice(out, decoded, (0, 0, 0))
        return paged_prefill(
            q,
            kv,
            metadata.block_tables,
            metadata.positions,
            shared.tiles,
            out,
            scale=spec.scale,
            window=spec.window,
            variant=spec.variant,
            row_params=metadata.row_params,
            seq_lens=metadata.seq_lens,
            group=_CPU_TILES if jax.default_backend() == "cpu" else _ACCELERATOR_TILES,
        )


BACKEND = XLABackend()
