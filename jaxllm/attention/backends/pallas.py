"""Attention by the Pallas kernels, on Hopper GPUs."""

import functools
import logging
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.attention.backend import (
    AttentionSpec,
    AttentionTarget,
    HeadTransform,
    SlotMapping,
)
from jaxllm.attention.kv_cache import stored_dtype
from jaxllm.attention.metadata import AttentionMetadata
from jaxllm.config.plan import BatchKind
from jaxllm.errors import ConfigError
from pallas_kernels.attention.decode_config import (
    DecodeConfig,
    default_decode_config,
    head_groups,
    refuses_decode_sm90,
)
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_sm90 import DecodeOp, paged_decode_sm90
from pallas_kernels.attention.latent_prefill_sm90 import (
    LATENT_TILES,
    make_latent_tiles,
    paged_latent_prefill_sm90,
    refuses_latent_prefill_sm90,
)
from pallas_kernels.attention.page_map import PageMap, prefill_map
from pallas_kernels.attention.prefill_sm90 import (
    default_prefill_config,
    paged_prefill_sm90,
    refuses_prefill_sm90,
)
from pallas_kernels.attention.prefill_tiles import (
    PrefillConfig,
    PrefillTiles,
    make_prefill_tiles,
)
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_check import make_case, why_not_lowered
from pallas_kernels.attention.variant_params import TokenValues, param_arrays
from pallas_kernels.attention.xla_spans import Sight
from pallas_kernels.head_dims import cut_heads, padded_dim
from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.kv_write.kv_write_sm90 import KVWriteConfig, refuses_kv_write_sm90
from pallas_kernels.tuning.table import tuned

logger = logging.getLogger(__name__)

HOPPER = "9.0"
_Sight = tuple[int | None, AttentionVariant, int, int, int, int | None]
_Tiling = tuple[PrefillConfig, int]  # and into how many rows a token is cut


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Prepared:
    """A decode plan for each of ``sights``: what a layer sees decides which splits exist. Tiles for
    each of ``tilings``; none in a pure decode step."""

    sights: tuple[_Sight, ...] = field(metadata={"static": True})
    plans: tuple[DecodePlan, ...]
    tilings: tuple[_Tiling, ...] = field(metadata={"static": True})
    tiles: tuple[PrefillTiles, ...]
    maps: tuple[PageMap | None, ...]  # of prefill: for each of ``sights`` that is mapped


class PallasBackend:
    name = "pallas"

    def __init__(self, device_kind: str = ""):
        self._device_kind = device_kind
        self.decode_config = tuned("decode", device_kind, DecodeConfig())
        self._write_config = tuned("kv_write", device_kind, KVWriteConfig())

    def on(self, target: AttentionTarget) -> "PallasBackend":
        try:
            return PallasBackend(target.device_kind)
        except ValueError as error:  # the device's file of tuned configs
            raise ConfigError(str(error)) from error

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        if target.platform != "gpu" or target.compute_capability != HOPPER:
            return "its kernels are for Hopper GPUs (compute capability 9.0)"
        shape, where = (spec.num_heads, spec.num_kv_heads, self._dim(spec)), "sm_90"
        kept = (target.page_size, target.dtype)
        config = self._decode_config(spec, target.page_size)
        pages = stored_dtype(target.page_dtype or target.dtype)
        numbers = len(spec.variant.token_params)
        reason = refuses_decode_sm90(*shape, *kept, where, config, pages, numbers, spec.value_dim)
        if reason is not None:
            return reason
        if spec.value_dim is None:
            reason = refuses_prefill_sm90(*shape, *kept, where, pages)
            return reason or refuses_variant(spec.variant)
        if spec.window is not None or not spec.variant.is_plain:
            return "its prefill kernel of latents takes no window and no variant"
        return refuses_latent_prefill_sm90(*shape, spec.value_dim, *kept, where, pages)

    def cache_head_dim(self, head_dim: int) -> int:
        return padded_dim(head_dim)

    def _dim(self, spec: AttentionSpec) -> int:
        """Channels of a key in the pages; latents are never padded."""
        return spec.head_dim if spec.value_dim else self.cache_head_dim(spec.head_dim)

    def prepare(
        self,
        metadata: AttentionMetadata,
        kind: BatchKind,
        specs: tuple[AttentionSpec, ...],
        page_size: int,
    ) -> _Prepared:
        rows, max_pages = metadata.block_tables.shape
        decoding = jnp.arange(rows, dtype=jnp.int32) < metadata.num_decode_rows
        lens = jnp.where(decoding, metadata.seq_lens, 0)
        by_sight = {_sight(spec): spec for spec in specs}
        plans = tuple(
            plan_decode(
                lens,
                max_pages=max_pages,
                page_size=page_size,
                num_kv_heads=_groups(spec),
                window=spec.window,
                config=self._decode_config(spec, page_size),
                variant=spec.variant,
                num_heads=spec.num_heads,
                head_dim=self._dim(spec),
                row_params=metadata.row_params,
            )
            for spec in by_sight.values()
        )
        if kind is BatchKind.DECODE:
            return _Prepared(tuple(by_sight), plans, (), (), ())
        batch = (metadata.query_start_loc, metadata.seq_lens, metadata.num_decode_rows)
        batch = (*batch, metadata.positions.shape[0])
        tilings = tuple(dict.fromkeys(self._tiling(spec, page_size) for spec in specs))
        made = {
            (config, rows): make_prefill_tiles(*batch, config)
            if rows == 1
            else make_latent_tiles(*batch, rows)
            for config, rows in tilings
        }
        maps = tuple(
            self._map(spec, metadata, made, page_size) if spec.variant.is_mapped else None
            for spec in by_sight.values()
        )
        return _Prepared(tuple(by_sight), plans, tilings, tuple(made.values()), maps)

    def _map(
        self,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
        tiles: dict[_Tiling, PrefillTiles],
        page_size: int,
    ) -> PageMap:
        tables, tiling = metadata.block_tables.shape, self._tiling(spec, page_size)
        sight = Sight(spec.window, spec.variant, metadata.row_params, page_size, tables)
        return prefill_map(tiles[tiling], spec.num_heads, sight, tiling[0])

    def write(
        self,
        qkv: Float[Array, "T C"],
        kv: Float[Array, "P 2 K B D"],
        slots: SlotMapping,
        heads: HeadTransform,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "P 2 K B D"]]:
        """By the kernel, or by XLA if the kernel refuses."""
        reason = refuses_kv_write_sm90(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            qkv.dtype,
            "sm_90",
            pages=kv.dtype,
            rotated=2 * heads.cos.shape[1],
            interleaved=heads.interleaved,
            qk_norm=heads.q_norm is not None,
        )
        if reason is not None:
            _say_once(reason)
        return rope_and_write(
            qkv,
            heads.cos,
            heads.sin,
            slots.pages,
            slots.offsets,
            kv,
            heads.q_norm,
            heads.k_norm,
            platform="sm_90",
            eps=heads.eps,
            interleaved=heads.interleaved,
            config=self._write_config,
            head_dim=spec.head_dim,
        )

    def attend(
        self,
        q: Float[Array, "T H D"],
        kv: Float[Array, "P 2 K B D"],
        metadata: AttentionMetadata,
        shared: _Prepared,
        spec: AttentionSpec,
        tokens: TokenValues | None = None,
    ) -> Float[Array, "T H D"]:
        rows = metadata.seq_lens.shape[0]
        tables = metadata.block_tables
        config = self._decode_config(spec, kv.shape[3])
        facts = (spec.scale, spec.window, spec.variant, config)
        op = DecodeOp(*facts, value_dim=spec.value_dim)
        sight = shared.sights.index(_sight(spec))
        plan, pages = shared.plans[sight], None if tokens is None else tokens.pages
        params = param_arrays(spec.variant, spec.num_heads, rows, metadata.row_params)
        decoded = paged_decode_sm90(
            q[:rows], kv, tables, plan, params, pages, op=op, tokens=q.shape[0]
        )
        if not shared.tiles:
            return cut_heads(decoded, spec.value_dim or spec.head_dim)
        # Decode rows are the first slots, so token i is slot i there.
        tiling = self._tiling(spec, kv.shape[3])
        tiles = shared.tiles[shared.tilings.index(tiling)]
        if spec.value_dim is not None:
            return paged_latent_prefill_sm90(q, kv, tables, tiles, decoded, scale=spec.scale)
        out = paged_prefill_sm90(
            q,
            kv,
            tables,
            tiles,
            decoded,
            scale=spec.scale,
            window=spec.window,
            variant=spec.variant,
            row_params=metadata.row_params,
            tokens=tokens,
            page_map=shared.maps[sight],
            config=tiling[0],
        )
        return cut_heads(out, spec.head_dim)

    def _decode_config(self, spec: AttentionSpec, page_size: int) -> DecodeConfig:
        """Wide heads leave room for one thread block on an SM, not for two."""
        dim, group = self._dim(spec), spec.num_heads // _groups(spec)
        if spec.value_dim is not None:
            return default_decode_config(dim, page_size, group, value_dim=spec.value_dim)
        if dim <= 128:
            return self.decode_config
        default = default_decode_config(dim, page_size, group)
        return tuned("decode", self._device_kind, default)

    def _tiling(self, spec: AttentionSpec, page_size: int) -> _Tiling:
        if spec.value_dim is not None:
            return LATENT_TILES, spec.num_heads
        dim = self._dim(spec)
        default = default_prefill_config(spec.num_heads, spec.num_kv_heads, dim)
        where = {"page": page_size, "dim": dim}
        return tuned("prefill", self._device_kind, default, where=where), 1


def _groups(spec: AttentionSpec) -> int:
    return head_groups(spec.num_heads, spec.num_kv_heads, spec.value_dim)


def _sight(spec: AttentionSpec) -> _Sight:
    """What decides which positions a layer's queries see, and who attends them."""
    hides = spec.variant.kv_range is not None or spec.variant.is_mapped
    variant = spec.variant if hides else CAUSAL
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return spec.window, variant, *heads, spec.value_dim


@functools.cache
def refuses_variant(variant: AttentionVariant) -> str | None:
    """Lowered for the shape of tests: what a function may use does not depend on the model's."""
    if variant.is_plain:
        return None
    alone = replace(variant.without_values(), head_axis=None)
    return why_not_lowered(make_case(alone, dtype="bfloat16"))


@functools.cache
def _say_once(reason: str) -> None:
    """Every layer of every program asks."""
    logger.warning("Plain XLA writes keys and values: %s", reason)


BACKEND = PallasBackend()
