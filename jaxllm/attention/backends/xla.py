"""Attention in plain XLA: runs on every platform, and is what kernels are compared with."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.attention.backend import (
    AttentionSpec,
    AttentionTarget,
    HeadTransform,
    SlotMapping,
)
from jaxllm.attention.metadata import AttentionMetadata
from jaxllm.config.plan import BatchKind
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import TokenValues
from pallas_kernels.attention.xla import paged_decode, paged_prefill
from pallas_kernels.attention.xla_queries import TileMap, make_tile_map
from pallas_kernels.attention.xla_spans import (
    Sight,
    SpanMap,
    decode_spans,
    prefill_spans,
)
from pallas_kernels.kv_write.xla import rope_and_write_xla

# Tiles attended at once: a CPU works on one after the other, an accelerator wants many.
_CPU_TILES, _ACCELERATOR_TILES = 1, 64


_Seeing = tuple[int | None, AttentionVariant, int]  # window, variant, query heads


def write_by_xla(
    qkv: Float[Array, "T C"],
    kv: Float[Array, "P 2 K B D"],
    slots: SlotMapping,
    heads: HeadTransform,
) -> tuple[Float[Array, "T H D"], Float[Array, "P 2 K B D"]]:
    """``AttentionBackend.write`` on any device, and differentiable."""
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Prepared:
    """``spans`` of decode and of prefill, for each of the layers' ways of ``seeing`` that a mask
    decides without saying where it ends."""

    tiles: TileMap | None  # None in a pure decode step
    seeing: tuple[_Seeing, ...] = field(metadata={"static": True})
    spans: tuple[tuple[SpanMap, SpanMap | None], ...]

    def spans_of(self, spec: AttentionSpec) -> tuple[SpanMap | None, SpanMap | None]:
        seeing = _seeing(spec)
        return self.spans[self.seeing.index(seeing)] if seeing in self.seeing else (None, None)


class XLABackend:
    name = "xla"

    def __init__(self, platform: str | None = None):
        """``platform``: "cpu" or "gpu"; default that of this process."""
        self._platform = platform

    def on(self, target: AttentionTarget) -> "XLABackend":
        return XLABackend(target.platform)

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
        tiles = None
        if kind is not BatchKind.DECODE:
            tiles = make_tile_map(
                metadata.query_start_loc, metadata.num_decode_rows, metadata.positions.shape[0]
            )
        seeing = tuple(dict.fromkeys(_seeing(s) for s in specs if s.variant.is_mapped))
        spans = tuple(_spans(way, metadata, tiles, page_size) for way in seeing)
        return _Prepared(tiles, seeing, spans)

    def write(
        self,
        qkv: Float[Array, "T C"],
        kv: Float[Array, "P 2 K B D"],
        slots: SlotMapping,
        heads: HeadTransform,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "P 2 K B D"]]:
        return write_by_xla(qkv, kv, slots, heads)

    def attend(
        self,
        q: Float[Array, "T H D"],
        kv: Float[Array, "P S K B D"],
        metadata: AttentionMetadata,
        shared: _Prepared,
        spec: AttentionSpec,
        tokens: TokenValues | None = None,
    ) -> Float[Array, "T H V"]:
        rows = metadata.seq_lens.shape[0]
        first = None if tokens is None else tokens._replace(queries=tokens.queries[:rows])
        decoding, prefilling = shared.spans_of(spec)
        decoded = paged_decode(
            q[:rows],
            kv,
            metadata.block_tables,
            _decode_lens(metadata),
            scale=spec.scale,
            window=spec.window,
            variant=spec.variant,
            row_params=metadata.row_params,
            value_dim=spec.value_dim,
            spans=decoding,
            tokens=first,
        )
        if shared.tiles is None:
            return decoded
        platform = self._platform or jax.default_backend()
        # Decode rows are the first slots, so token i is slot i; the tiles fill in the rest.
        out = jnp.zeros((q.shape[0], *decoded.shape[1:]), q.dtype)
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
            value_dim=spec.value_dim,
            spans=prefilling,
            tokens=tokens,
            group=_CPU_TILES if platform == "cpu" else _ACCELERATOR_TILES,
        )


def _seeing(spec: AttentionSpec) -> _Seeing:
    return spec.window, spec.variant, spec.num_heads


def _decode_lens(metadata: AttentionMetadata) -> Int[Array, " R"]:
    in_decode = jnp.arange(metadata.seq_lens.shape[0]) < metadata.num_decode_rows
    return jnp.where(in_decode, metadata.seq_lens, 0)


def _spans(
    seeing: _Seeing, metadata: AttentionMetadata, tiles: TileMap | None, page_size: int
) -> tuple[SpanMap, SpanMap | None]:
    window, variant, heads = seeing
    sight = Sight(window, variant, metadata.row_params, page_size, metadata.block_tables.shape)
    decoding = decode_spans(_decode_lens(metadata), heads, sight)
    if tiles is None:
        return decoding, None
    return decoding, prefill_spans(metadata.positions, tiles, metadata.seq_lens, heads, sight)


BACKEND = XLABackend()
