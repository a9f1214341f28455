"""What attention must know of one step. A pytree, built once per step inside the jitted program."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.attention.backend import (
    AttentionBackend,
    AttentionSpec,
    HeadTransform,
    SlotMapping,
)
from jaxllm.attention.kv_cache import LayerPages, TokenPages, split_pages
from jaxllm.config.plan import BatchKind
from pallas_kernels.attention.variant_params import TokenValues, query_values
from pallas_kernels.kv_write.xla import kv_write


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """T tokens of R batch slots, one after the other; slot i owns tokens query_start_loc[i]:[i+1].

    Slots below ``num_decode_rows`` feed one token each, so token i belongs to slot i there.
    Padding tokens have position -1; padding slots have no tokens and seq_len 0.
    """

    positions: Int[Array, " T"]  # absolute; -1 for padding
    token_slots: Int[Array, " T"]  # batch slot of each token
    query_start_loc: Int[Array, " R1"]  # R + 1 entries
    seq_lens: Int[Array, " R"]  # tokens in the cache after this step
    block_tables: Int[Array, "R M"]  # logical page -> page; entries past seq_lens mean nothing
    num_decode_rows: Int[Array, ""]
    row_params: dict[str, Array] = field(default_factory=dict)  # of variants: [R] or [R, size] each
    token_params: dict[str, Array] = field(default_factory=dict)  # what requests brought: [T] each

    def valid(self) -> Bool[Array, " T"]:
        return self.positions >= 0

    def slot_mapping(self, page_size: int) -> SlotMapping:
        """Padding gets a page past any cache, which every form of the write drops: the null page
        keeps its zeros, and JAX's clamping of a bad index can never overwrite a real page."""
        position = jnp.maximum(self.positions, 0)
        page = self.block_tables[self.token_slots, position // page_size]
        nowhere = jnp.iinfo(page.dtype).max
        return SlotMapping(jnp.where(self.valid(), page, nowhere), position % page_size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepAttention:
    """A backend bound to one step.

    A layer first writes, by ``write`` or ``write_pages``, then attends over the cache that the
    write returned; never the reverse order: reading the cache before writing it makes XLA copy it.
    """

    backend: AttentionBackend = field(metadata={"static": True})
    metadata: AttentionMetadata
    slots: SlotMapping
    shared: Any  # what backend.prepare() made for all layers

    @classmethod
    def bind(
        cls,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
        kind: BatchKind,
        specs: tuple[AttentionSpec, ...],
        page_size: int,
    ) -> "StepAttention":
        shared = backend.prepare(metadata, kind, specs, page_size)
        return cls(backend, metadata, metadata.slot_mapping(page_size), shared)

    def write(
        self, qkv: Float[Array, "T C"], kv: LayerPages, heads: HeadTransform, spec: AttentionSpec
    ) -> tuple[Float[Array, "T H W"], LayerPages]:
        """Queries ready to attend with, as wide as the cache's heads, and the cache with the step's
        keys and values."""
        pages, tokens = split_pages(kv)
        q, pages = self.backend.write(qkv, pages, self.slots, heads, spec)
        return q, pages if tokens is None else TokenPages(pages, tokens)

    def write_pages(
        self, k: Float[Array, "T K D"], v: Float[Array, "T K D"] | None, kv: LayerPages
    ) -> LayerPages:
        """The cache with keys and values that the layer has made itself, as they are; without
        values where pages hold keys alone."""
        pages, tokens = split_pages(kv)
        pages = kv_write(pages, k, v, *self.slots)
        return pages if tokens is None else TokenPages(pages, tokens)

    def write_token_param(
        self, name: str, values: Float[Array, "T K"], kv: LayerPages, spec: AttentionSpec
    ) -> LayerPages:
        """The cache with the step's numbers of a per_token param of the layer's variant."""
        pages, tokens = split_pages(kv)
        assert tokens is not None, "the variant has no per_token params"
        page, offset = self.slots
        tokens = tokens.at[page, _place(spec, name), :, offset].set(values, mode="drop")
        return TokenPages(pages, tokens)

    def write_brought(
        self, kv: LayerPages, spec: AttentionSpec, but: Collection[str] = ()
    ) -> LayerPages:
        """The cache with what requests bring of the step's tokens, or the defaults. ``but``: params
        that the layer computes."""
        shape = (self.metadata.positions.shape[0], spec.num_kv_heads)
        for param in spec.variant.token_params:
            if param.name in but:
                continue
            default = jnp.full(shape[:1], param.value(spec.num_heads))
            values = self.metadata.token_params.get(param.name, default)
            kv = self.write_token_param(
                param.name, jnp.broadcast_to(values[:, None], shape), kv, spec
            )
        return kv

    def running_sum(
        self, name: str, x: Float[Array, "T K"], kv: LayerPages, spec: AttentionSpec
    ) -> Float[Array, "T K"]:
        """Of ``x`` over all tokens of a row up to each, where the param holds the sums of earlier
        steps. In what order a row's numbers are added depends on its own chunks alone."""
        metadata, tokens = self.metadata, split_pages(kv)[1]
        assert tokens is not None, "the variant has no per_token params"
        slots = metadata.token_slots
        place = jnp.arange(x.shape[0], dtype=jnp.int32) - metadata.query_start_loc[slots]
        place = jnp.where(metadata.valid(), place, 0)
        # Doubling (Hillis & Steele 1986) within each row: a scan of the whole step would add in an
        # order that follows where in the step a row lies.
        distance = 1
        while distance < x.shape[0]:
            earlier = jnp.where(place[:, None] >= distance, jnp.roll(x, distance, axis=0), 0.0)
            x, distance = x + earlier, 2 * distance
        last = metadata.positions - place - 1  # the row's token before its first of the step
        stored = query_values(tokens, metadata.block_tables, slots, last)[:, _place(spec, name)]
        return x + jnp.where(last[:, None] >= 0, stored, 0.0)

    def __call__(
        self, q: Float[Array, "T H _W"], kv: LayerPages, spec: AttentionSpec
    ) -> Float[Array, "T H V"]:
        pages, tokens = split_pages(kv)
        values = None
        if tokens is not None:
            page, offset = self.slots
            own = tokens.at[page, :, :, offset].get(mode="fill", fill_value=0)
            values = TokenValues(tokens, own)
        return self.backend.attend(q, pages, self.metadata, self.shared, spec, values)


def _place(spec: AttentionSpec, name: str) -> int:
    return [param.name for param in spec.variant.token_params].index(name)
