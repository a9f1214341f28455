"""Attention by the Pallas kernels, on Hopper GPUs."""

import functools
import logging
from dataclasses import dataclass, field

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
    refuses_decode_sm90,
)
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_sm90 import DecodeOp, paged_decode_sm90
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


_Sight = tuple[int | None, AttentionVariant, int, int, int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Prepared:
    """A decode plan for each of ``sights``: what a layer sees decides which splits exist. Tiles for
    each of ``configs``; none in a pure decode step."""

    sights: tuple[_Sight, ...] = field(metadata={"static": True})
    plans: tuple[DecodePlan, ...]
    configs: tuple[PrefillConfig, ...] = field(metadata={"static": True})
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
        if spec.value_dim is not None:
            return "its kernels read values from pages, which a latent layer's have none of"
        dim = self.cache_head_dim(spec.head_dim)
        facts = (spec.num_heads, spec.num_kv_heads, dim, target.page_size, target.dtype)
        config = self._decode_config(spec, target.page_size)
        pages = stored_dtype(target.page_dtype or target.dtype)
        numbers = len(spec.variant.token_params)
        reason = refuses_decode_sm90(
            *facts, "sm_90", config, pages, numbers
        ) or refuses_prefill_sm90(*facts, "sm_90", pages)
        return reason or refuses_variant(spec.variant)

    def cache_head_dim(self, head_dim: int) -> int:
        return padded_dim(head_dim)

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
                num_kv_heads=spec.num_kv_heads,
                window=spec.window,
                config=self._decode_config(spec, page_size),
                variant=spec.variant,
                num_heads=spec.num_heads,
                head_dim=self.cache_head_dim(spec.head_dim),
                row_params=metadata.row_params,
            )
            for spec in by_sight.values()
        )
        if kind is BatchKind.DECODE:
            return _Prepared(tuple(by_sight), plans, (), (), ())
        configs = tuple(dict.fromkeys(self._prefill_config(spec, page_size) for spec in specs))
        tiles = tuple(
            make_prefill_tiles(
                metadata.query_start_loc,
                metadata.seq_lens,
                metadata.num_decode_rows,
                metadata.positions.shape[0],
                config,
            )
            for config in configs
        )
        made = dict(zip(configs, tiles, strict=True))
        maps = tuple(
            self._map(spec, metadata, made, page_size) if spec.variant.is_mapped else None
            for spec in by_sight.values()
        )
        return _Prepared(tuple(by_sight), plans, configs, tiles, maps)

    def _map(
        self,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
        tiles: dict[PrefillConfig, PrefillTiles],
        page_size: int,
    ) -> PageMap:
        tables, config = metadata.block_tables.shape, self._prefill_config(spec, page_size)
        sight = Sight(spec.window, spec.variant, metadata.row_params, page_size, tables)
        return prefill_map(tiles[config], spec.num_heads, sight, config)

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
        op = DecodeOp(spec.scale, spec.window, spec.variant, config)
        sight = shared.sights.index(_sight(spec))
        plan, pages = shared.plans[sight], None if tokens is None else tokens.pages
        params = param_arrays(spec.variant, spec.num_heads, rows, metadata.row_params)
        decoded = paged_decode_sm90(
            q[:rows], kv, tables, plan, params, pages, op=op, tokens=q.shape[0]
        )
        if not shared.tiles:
            return cut_heads(decoded, spec.head_dim)
        # Decode rows are the first slots, so token i is slot i there.
        prefill = self._prefill_config(spec, kv.shape[3])
        out = paged_prefill_sm90(
            q,
            kv,
            tables,
            shared.tiles[shared.configs.index(prefill)],
            decoded,
            scale=spec.scale,
            window=spec.window,
            variant=spec.variant,
            row_params=metadata.row_params,
            tokens=tokens,
            page_map=shared.maps[sight],
            config=prefill,
        )
        return cut_heads(out, spec.head_dim)

    def _decode_config(self, spec: AttentionSpec, page_size: int) -> DecodeConfig:
        """Wide heads leave room for one thread block on an SM, not for two."""
        dim = self.cache_head_dim(spec.head_dim)
        if dim <= 128:
            return self.decode_config
        default = default_decode_config(dim, page_size, spec.num_heads // spec.num_kv_heads)
        return tuned("decode", self._device_kind, default)

    def _prefill_config(self, spec: AttentionSpec, page_size: int) -> PrefillConfig:
        dim = self.cache_head_dim(spec.head_dim)
        default = default_prefill_config(spec.num_heads, spec.num_kv_heads, dim)
        where = {"page": page_size, "dim": dim}
        return tuned("prefill", self._device_kind, default, where=where)


def _sight(spec: AttentionSpec) -> _Sight:
    """What decides which positions a layer's queries see, and who attends them."""
    hides = spec.variant.kv_range is not None or spec.variant.is_mapped
    variant = spec.variant if hides else CAUSAL
    return spec.window, variant, spec.num_heads, spec.num_kv_heads, spec.head_dim


@functools.cache
def refuses_variant(variant: AttentionVariant) -> str | None:
    """Lowered for the shape of tests: what a function may use does not depend on the model's."""
    if variant.is_plain:
        return None
    return why_not_lowered(make_case(variant.without_values(), dtype="bfloat16"))


@functools.cache
def _say_once(reason: str) -> None:
    """Every layer of every program asks."""
    logger.warning("Plain XLA writes keys and values: %s", reason)


BACKEND = PallasBackend()
