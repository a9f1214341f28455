"""Activations read and changed on the way through a model, batched by row.

What is read, and what is changed, are operands of fixed sizes: one program serves any request.
Exists in the programs of steps that have such requests, and in no other.
"""

from dataclasses import dataclass, field, replace
from typing import override

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import LayerPages, split_pages
from jaxllm.attention.metadata import StepAttention
from pallas_kernels.attention.reference import attention_probs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edits:
    """What the requests in all rows change; S rows, A slots of vectors, L layers.

    Slot by slot, a vector is added to ``resid.N``, or put in its place, at the positions from
    ``first`` to ``last``. Zeros everywhere change nothing.
    """

    site: Int[Array, "S A"]  # N + 1; 0 is an empty slot
    first: Int[Array, "S A"]
    last: Int[Array, "S A"]
    replaces: Bool[Array, "S A"]
    vector: Float[Array, "S A E"]
    ablated: Bool[Array, "S L H"]  # heads whose output is left out


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reads:
    """Entries to be read, each a token of the step and a code; entries of code -1 are padding.

    ``vectors``: code N is ``resid.N``, code L + 1 + N is ``attn_out.N``. ``lens``: ``resid.N``, for
    logits. ``probs``: ``attn_probs.N``, in order of layers: those of layer N are the entries from
    ``probs_start[N]`` to ``probs_start[N + 1]``.
    """

    vectors: Int[Array, "2 M"]
    lens: Int[Array, "2 Q"]
    probs: Int[Array, "2 P"]
    probs_start: Int[Array, " L1"]
    again: Int[Array, ""]  # 1: the step has run already, and runs for more entries only


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TapArrays:
    """What was read, entry by entry; padding holds zeros."""

    vectors: Float[Array, "M E"]
    lens: Float[Array, "Q V"]  # [Q, E] states while the model runs
    probs: Float[Array, "P H N"]  # N: keys of the longest row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taps:
    """One step's. The model hands it from layer to layer, each of which returns it with what it
    has read.
    """

    num_layers: int = field(metadata={"static": True})
    layer: Int[Array, ""]  # where the model is
    rows: Int[Array, " T"]  # permanent row of each token
    positions: Int[Array, " T"]
    edits: Edits
    reads: Reads
    found: TapArrays

    def at(self, layer: int) -> "Taps":
        return replace(self, layer=jnp.int32(layer))

    def state(
        self, x: Float[Array, "T E"], branch: Float[Array, "T E"] | None
    ) -> "tuple[Float[Array, 'T E'], Taps]":
        """``resid`` of where the model is: changed, then read."""
        x = self._changed(x if branch is None else x + branch)
        vectors = _read(self.found.vectors, self.reads.vectors, self.layer, x)
        lens = _read(self.found.lens, self.reads.lens, self.layer, x)
        return x, replace(self, found=replace(self.found, vectors=vectors, lens=lens))

    def heads(
        self,
        out: Float[Array, "T H V"],
        q: Float[Array, "T H D"],
        kv: LayerPages,
        attend: StepAttention,
        spec: AttentionSpec,
    ) -> "tuple[Float[Array, 'T H V'], Taps]":
        """What the heads attend to, without the ablated ones; probabilities are computed again for
        the tokens that want them, in float32 over the layer's cache.
        """
        ablated = self.edits.ablated[self.rows, self.layer][:, :, None]
        out = jnp.where(ablated, jnp.zeros_like(out), out)
        metadata, reads = attend.metadata, self.reads
        pages, tokens = split_pages(kv)

        def one(entry: Int[Array, ""], probs: Float[Array, "P H N"]) -> Float[Array, "P H N"]:
            token = reads.probs[0, entry]
            row = lax.dynamic_slice_in_dim(metadata.token_slots, token, 1)
            weights = attention_probs(
                lax.dynamic_slice_in_dim(q, token, 1),
                pages,
                metadata.block_tables,
                row,
                lax.dynamic_slice_in_dim(metadata.positions, token, 1),
                scale=spec.scale,
                window=spec.window,
                variant=spec.variant,
                row_params=metadata.row_params,
                seq_lens=metadata.seq_lens,
                token_pages=tokens,
            )
            return probs.at[entry].set(weights[0])

        bounds = lax.dynamic_slice_in_dim(reads.probs_start, self.layer, 2)
        probs = lax.fori_loop(bounds[0], bounds[1], one, self.found.probs)
        return out, replace(self, found=replace(self.found, probs=probs))

    def attention_out(self, branch: Float[Array, "T E"]) -> "Taps":
        code = self.num_layers + 1 + self.layer
        vectors = _read(self.found.vectors, self.reads.vectors, code, branch)
        return replace(self, found=replace(self.found, vectors=vectors))

    def _changed(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """A pass over all tokens for every slot in use here, in float32."""
        edits = self.edits
        here = edits.site[self.rows] == self.layer + 1  # [T, A]
        here &= edits.first[self.rows] <= self.positions[:, None]
        here &= self.positions[:, None] <= edits.last[self.rows]
        slots = jnp.arange(1, here.shape[1] + 1, dtype=jnp.int32)
        used = jnp.max(jnp.where(here.any(axis=0), slots, 0))

        def change(slot: Int[Array, ""], out: Float[Array, "T E"]) -> Float[Array, "T E"]:
            vector = edits.vector[self.rows, slot]
            added = jnp.where(edits.replaces[self.rows, slot][:, None], vector, out + vector)
            return jnp.where(here[:, slot][:, None], added, out)

        return lax.fori_loop(0, used, change, x.astype(jnp.float32)).astype(x.dtype)


@dataclass(frozen=True)
class TappedAttention(StepAttention):
    """Attends as it would without taps, for any layer, and taps what is attended. Made anew for
    each layer, while it is traced: ``taps`` ends with what has been read so far."""

    taps: list[Taps]

    @classmethod
    def of(cls, attend: StepAttention, taps: Taps) -> "TappedAttention":
        return cls(attend.backend, attend.metadata, attend.slots, attend.shared, [taps])

    @override
    def __call__(self, q: Float[Array, "T H _W"], kv: LayerPages, spec: AttentionSpec) -> Array:
        out, taps = self.taps[-1].heads(super().__call__(q, kv, spec), q, kv, self, spec)
        self.taps.append(taps)
        return out


def _read(
    into: Float[Array, "M E"], entries: Int[Array, "2 M"], code: Array, x: Float[Array, "T E"]
) -> Float[Array, "M E"]:
    return jnp.where((entries[1] == code)[:, None], x[entries[0]].astype(jnp.float32), into)
