"""Attention over one whole sequence in float32, to be differentiated: it serves nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.attention.backend import (
    AttentionSpec,
    AttentionTarget,
    HeadTransform,
    SlotMapping,
)
from jaxllm.attention.backends.xla import write_by_xla
from jaxllm.attention.kv_cache import LayerPages, TokenPages, page_shape, token_shape
from jaxllm.attention.metadata import AttentionMetadata, StepAttention
from jaxllm.config.plan import BatchKind
from pallas_kernels.attention.reference import masked_softmax, modified_scores
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import OfPair, Params, TokenValues


class DenseBackend:
    """The cache of a layer is one page as long as the sequence. What layers share (``shared``) is
    one layer's: the values of its variant's params, which may be learned.
    """

    name = "dense"

    def on(self, target: AttentionTarget) -> "DenseBackend":
        return self

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        return "it has no pages"

    def cache_head_dim(self, head_dim: int) -> int:
        return head_dim

    def prepare(
        self,
        metadata: AttentionMetadata,
        kind: BatchKind,
        specs: tuple[AttentionSpec, ...],
        page_size: int,
    ) -> Params:
        return {}

    def write(
        self,
        qkv: Float[Array, "T C"],
        kv: Float[Array, "1 2 K T D"],
        slots: SlotMapping,
        heads: HeadTransform,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T H D"], Float[Array, "1 2 K T D"]]:
        return write_by_xla(qkv, kv, slots, heads)

    def attend(
        self,
        q: Float[Array, "T H D"],
        kv: Float[Array, "1 S K T D"],
        metadata: AttentionMetadata,
        shared: Params,
        spec: AttentionSpec,
        tokens: TokenValues | None = None,
    ) -> Float[Array, "T H V"]:
        groups, variant = spec.num_heads // spec.num_kv_heads, spec.variant
        parts = jnp.repeat(kv[0].astype(jnp.float32), groups, axis=1)  # [S, H, T, D]
        keys, values = parts[0], parts[-1, ..., : spec.value_dim]
        scores = jnp.einsum("thd,hnd->thn", q.astype(jnp.float32), keys) * spec.scale
        scores, visible = modified_scores(
            scores,
            metadata.token_slots,
            metadata.positions,
            variant,
            shared,
            window=spec.window,
            seq_lens=metadata.seq_lens,
            tokens=_token_pairs(variant, tokens, groups),
        )
        sink = None if variant.sinks is None else shared[variant.sinks]
        weights = masked_softmax(scores, visible, sink)
        return jnp.einsum("thn,hnd->thd", weights, values).astype(q.dtype)


def whole_sequence(num_tokens: int, params: Params) -> StepAttention:
    """One layer's attention over a sequence; ``params`` as ``param_arrays`` gives them."""
    positions = jnp.arange(num_tokens, dtype=jnp.int32)
    metadata = AttentionMetadata(
        positions=positions,
        token_slots=jnp.zeros_like(positions),
        query_start_loc=jnp.asarray([0, num_tokens], jnp.int32),
        seq_lens=jnp.asarray([num_tokens], jnp.int32),
        block_tables=jnp.zeros((1, 1), jnp.int32),
        num_decode_rows=jnp.int32(0),
    )
    return StepAttention(_BACKEND, metadata, metadata.slot_mapping(num_tokens), params)


def _token_pairs(
    variant: AttentionVariant, tokens: TokenValues | None, groups: int
) -> dict[str, OfPair]:
    """As they broadcast with scores [T, H, T]."""
    if tokens is None:
        return {}
    query = jnp.repeat(tokens.queries, groups, axis=2)[..., None]  # [T, N, H, 1]
    key = jnp.repeat(tokens.pages[0], groups, axis=1)  # [N, H, T]
    named = enumerate(variant.token_params)
    return {param.name: OfPair(query[:, i], key[None, i]) for i, param in named}


def empty_page(spec: AttentionSpec, num_tokens: int, dtype: jnp.dtype) -> LayerPages:
    page = jnp.zeros((1, *page_shape(spec, num_tokens)), dtype)
    if not spec.variant.token_params:
        return page
    defaults = jnp.asarray([param.value(spec.num_heads) for param in spec.variant.token_params])
    shape = (1, *token_shape(spec, num_tokens))
    return TokenPages(page, jnp.broadcast_to(defaults[None, :, None, None], shape))


_BACKEND = DenseBackend()
