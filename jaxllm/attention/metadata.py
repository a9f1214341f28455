"""What attention must know of one step. A pytree, built once per step inside the jitted program."""

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
from jaxllm.config.plan import BatchKind
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
        self, qkv: Float[Array, "T C"], kv: Array, heads: HeadTransform, spec: AttentionSpec
    ) -> tuple[Float[Array, "T H W"], Array]:
        """Queries ready to attend with, as wide as the cache's heads, and the cache with the step's
        keys and values."""
        return self.backend.write(qkv, kv, self.slots, heads, spec)

    def write_pages(
        self, k: Float[Array, "T K D"], v: Float[Array, "T K D"], kv: Array
    ) -> Float[Array, "P 2 K B W"]:
        """The cache with keys and values that the layer has made itself, as they are."""
        return kv_write(kv, k, v, *self.slots)

    def __call__(
        self, q: Float[Array, "T H _W"], kv: Array, spec: AttentionSpec
    ) -> Float[Array, "T H D"]:
        return self.backend.attend(q, kv, self.metadata, self.shared, spec)
