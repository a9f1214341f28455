"""What attention must know of one step. A pytree, built once per step inside the jitted program."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.attention.backend import AttentionBackend, AttentionSpec
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

    def valid(self) -> Bool[Array, " T"]:
        return self.positions >= 0

    def pages_and_offsets(
        self, page_size: int, num_pages: int
    ) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
        """Where each token's K and V go. Padding gets page ``num_pages``, which a dropping scatter
        ignores: the null page keeps its zeros, and JAX's clamping of a bad index can never
        overwrite a real page."""
        position = jnp.maximum(self.positions, 0)
        page = self.block_tables[self.token_slots, position // page_size]
        return jnp.where(self.valid(), page, num_pages), position % page_size


def write_pages(
    kv: Float[Array, "P 2 K B D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    metadata: AttentionMetadata,
) -> Float[Array, "P 2 K B D"]:
    """Keys and values of the step's tokens put into their pages by one scatter."""
    pages, offsets = metadata.pages_and_offsets(kv.shape[3], kv.shape[0])
    return kv_write(kv, k, v, pages, offsets)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepAttention:
    """A backend bound to one step. Writes K and V to their pages, then attends; never the reverse
    order: reading the cache before writing it makes XLA copy the cache.
    """

    backend: AttentionBackend = field(metadata={"static": True})
    metadata: AttentionMetadata
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
        return cls(backend, metadata, backend.prepare(metadata, kind, specs, page_size))

    def __call__(
        self,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        kv: Array,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T H D"], Array]:
        kv = write_pages(kv, k, v, self.metadata)
        return self.backend.attend(q, kv, self.metadata, self.shared, spec), kv
