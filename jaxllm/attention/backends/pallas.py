"""Attention by the Pallas kernels, on Hopper GPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.metadata import AttentionMetadata
from jaxllm.config.plan import BatchKind
from pallas_kernels.attention.decode_config import DecodeConfig, refuses_decode_sm90
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_sm90 import DecodeOp, paged_decode_sm90
from pallas_kernels.attention.prefill_sm90 import (
    default_prefill_config,
    paged_prefill_sm90,
    refuses_prefill_sm90,
)
from pallas_kernels.attention.prefill_tiles import PrefillTiles, make_prefill_tiles

HOPPER = "9.0"
# From this version on Mosaic finds no register layout for the decode kernel.
TOO_NEW = (0, 12)


class _Prepared(NamedTuple):
    """Decode plans by window of the layer (-1: none): a window decides which splits exist."""

    plans: dict[int, DecodePlan]
    tiles: PrefillTiles | None  # None in a pure decode step


class PallasBackend:
    name = "pallas"
    decode_config = DecodeConfig()

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        if target.platform != "gpu" or target.compute_capability != HOPPER:
            return "its kernels are for Hopper GPUs (compute capability 9.0)"
        if jax.__version_info__ >= TOO_NEW:
            return f"its kernels do not lower on JAX {jax.__version__}; install JAX 0.11"
        facts = (spec.num_heads, spec.num_kv_heads, spec.head_dim, target.page_size, target.dtype)
        return refuses_decode_sm90(*facts, "sm_90", self.decode_config) or refuses_prefill_sm90(
            *facts, "sm_90"
        )

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
        plans = {
            spec.window or -1: plan_decode(
                lens,
                max_pages=max_pages,
                page_size=page_size,
                window=spec.window,
                config=self.decode_config,
            )
            for spec in specs
        }
        if kind is BatchKind.DECODE:
            return _Prepared(plans, None)
        tiles = make_prefill_tiles(
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.num_decode_rows,
            metadata.positions.shape[0],
            default_prefill_config(specs[0].num_heads, specs[0].num_kv_heads),
        )
        return _Prepared(plans, tiles)

    def attend(
        self,
        q: Float[Array, "T H D"],
        kv: Float[Array, "P 2 K B D"],
        metadata: AttentionMetadata,
        shared: _Prepared,
        spec: AttentionSpec,
    ) -> Float[Array, "T H D"]:
        rows = metadata.seq_lens.shape[0]
        tables = metadata.block_tables
        op = DecodeOp(spec.scale, spec.window, None, self.decode_config)
        plan = shared.plans[spec.window or -1]
        decoded = paged_decode_sm90(q[:rows], kv, tables, plan, op=op)
        if shared.tiles is None:
            return decoded
        out = paged_prefill_sm90(q, kv, tables, shared.tiles, scale=spec.scale, window=spec.window)
        # Decode rows are the first slots, so token i is slot i there.
        merged = jnp.where(_column(rows) < metadata.num_decode_rows, decoded, out[:rows])
        return jax.lax.dynamic_update_slice(out, merged, (0, 0, 0))


def _column(rows: int) -> Int[Array, "R 1 1"]:
    return jnp.arange(rows, dtype=jnp.int32)[:, None, None]


BACKEND = PallasBackend()
