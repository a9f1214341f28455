"""The decoder-only transformer that every architecture here is a variation of.

A file of an architecture reads its config.json and names its tensors; what differs in computation
is a switch of ModelConfig or an overridden method. Nothing here knows of rows, buckets or requests.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import KVCache, LayerPages, by_layer, from_layers
from jaxllm.attention.layers import computed_by, layer_class
from jaxllm.attention.metadata import StepAttention
from jaxllm.config.model import ModelConfig
from jaxllm.layers.embedding import Embedding
from jaxllm.layers.experts import Experts
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rotary import RotaryTable, rotary_table
from jaxllm.layers.taps import TappedAttention, Taps
from jaxllm.weights.mapping import WeightRule


def mlp_class(config: ModelConfig, layer: int) -> type[GatedMLP | Experts]:
    experts = config.experts
    return GatedMLP if experts is None or layer < experts.first_layer else Experts


class DecoderLayer(nnx.Module):
    """Pre-norm block; with ``sandwich_norms`` each branch is normalised again before it is
    added.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype, platform: str):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, platform=platform)

        self.input_norm = norm()
        self.attention = layer_class(config, layer)(config, layer, dtype=dtype)
        self.attention_out_norm = norm() if config.sandwich_norms else None
        self.mlp_norm = norm()
        self.mlp = mlp_class(config, layer)(config, dtype=dtype, platform=platform)
        self.mlp_out_norm = norm() if config.sandwich_norms else None

    def __call__(
        self,
        x: Float[Array, "T E"],
        branch: Float[Array, "T E"] | None,
        kv: LayerPages,
        table: RotaryTable,
        attend: StepAttention,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"], LayerPages, Taps | None]:
        """The residual stream is ``x + branch``, coming in and going out: each norm adds the branch
        before it, in the pass over memory that it makes anyway.
        """
        if taps is not None:
            (x, taps), branch = taps.state(x, branch), None
        with jax.named_scope("attention"):
            normed, x = self.input_norm.add(x, branch)
            tapped = attend if taps is None else TappedAttention.of(attend, taps)
            branch, kv = self.attention(normed, kv, table, tapped)
            if self.attention_out_norm is not None:
                branch = self.attention_out_norm(branch)
            if isinstance(tapped, TappedAttention):
                taps = tapped.taps[-1].attention_out(branch)
        with jax.named_scope("mlp"):
            normed, x = self.mlp_norm.add(x, branch)
            branch = self.mlp(normed)
            if self.mlp_out_norm is not None:
                branch = self.mlp_out_norm(branch)
        return x, branch, kv, taps


@partial(jax.jit, static_argnames="structure")
def _layer(
    leaves: list[Array],
    x: Float[Array, "T E"],
    branch: Float[Array, "T E"] | None,
    kv: LayerPages,
    table: RotaryTable,
    attend: StepAttention,
    structure: tuple[Any, Any],
    taps: Taps | None = None,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"], LayerPages, Taps | None]:
    """One layer as a function of its parameters, so that layers of the same structure are traced
    and lowered once instead of once each; the compiler inlines the calls.
    """
    graphdef, treedef = structure
    layer: DecoderLayer = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    return layer(x, branch, kv, table, attend, taps)


class DecoderLM(nnx.Module):
    """Base of all architectures. ``__call__`` is pure in the parameters, the tokens and the KV
    cache. ``platform``, as pallas_kernels names it, says which kernels the layers may use.
    """

    # Tensors that checkpoints carry and we do not need (suffixes of names).
    ignored_weights: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq", "attn.masked_bias")

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, platform: str = "cpu"):
        self.config = config
        sizes, shards = (config.vocab_size, config.hidden_size), config.shards
        self.embed = Embedding(*sizes, dtype=dtype, shards=shards)
        self.layers = nnx.List(
            [
                DecoderLayer(config, layer, dtype=dtype, platform=platform)
                for layer in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, platform=platform)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Embedding(*sizes, dtype=dtype, shards=shards)

    def __call__(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv: KVCache,
        attend: StepAttention,
    ) -> tuple[Float[Array, "T E"], KVCache]:
        """Final hidden states of every token, and the cache with their keys and values written."""
        hidden, kv, _ = self.tapped(tokens, positions, kv, attend, None)
        return hidden, kv

    def tapped(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv: KVCache,
        attend: StepAttention,
        taps: Taps | None,
    ) -> tuple[Float[Array, "T E"], KVCache, Taps | None]:
        """The same, with activations read and changed on the way; None: neither."""
        x, branch = self.embed(tokens), None
        table = rotary_table(self.config.rope, jnp.maximum(positions, 0))
        written: list[LayerPages] = []
        pages = by_layer(self.config, kv)
        for index, (layer, layer_kv) in enumerate(zip(self.layers, pages, strict=True)):
            spec, computed = AttentionSpec.of(self.config, index), computed_by(layer.attention)
            layer_kv = attend.write_brought(layer_kv, spec, but=computed)
            graphdef, state = nnx.split(layer)
            leaves, treedef = jax.tree.flatten(state)
            structure = (graphdef, treedef)
            if taps is not None:
                taps = taps.at(index)
            x, branch, layer_kv, taps = _layer(
                leaves, x, branch, layer_kv, table, attend, structure, taps
            )
            written.append(layer_kv)
        if taps is not None:
            (x, taps), branch = taps.at(self.config.num_layers).state(x, branch), None
        return self.norm.add(x, branch)[0], from_layers(written), taps

    def compute_logits(self, hidden: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """float32 logits."""
        return (self.embed if self.lm_head is None else self.lm_head).attend(hidden)

    @classmethod
    def ignored(cls, config: ModelConfig) -> tuple[str, ...]:
        """``ignored_weights``, and the output matrix where it is the embedding (some files hold it
        twice).
        """
        tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
        return (*cls.ignored_weights, *tied)

    @classmethod
    def config_from_hf(cls, hf: dict[str, object]) -> ModelConfig:
        """Raises ConfigError for what this architecture cannot honour."""
        raise NotImplementedError

    @classmethod
    def weight_rules(cls, config: ModelConfig) -> list[WeightRule]:
        """How the tensors of a Hugging Face checkpoint become parameters (see
        weights/mapping.py).
        """
        rules = [
            WeightRule("embed.weight", ("model.embed_tokens.weight",)),
            WeightRule("norm.weight", ("model.norm.weight",)),
        ]
        if not config.tie_word_embeddings:
            rules.append(WeightRule("lm_head.weight", ("lm_head.weight",)))
        for layer in range(config.num_layers):
            ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
            attention = layer_class(config, layer)
            rules += attention.weight_rules(config, f"{ours}attention.", f"{theirs}self_attn.")
            rules += cls.layer_rules(config, layer, ours, theirs)
        return rules

    @classmethod
    def layer_rules(
        cls, config: ModelConfig, layer: int, ours: str, theirs: str
    ) -> list[WeightRule]:
        """Of one layer, without its attention, which knows its own."""
        mlp = mlp_class(config, layer)
        return [
            WeightRule(f"{ours}input_norm.weight", (f"{theirs}input_layernorm.weight",)),
            WeightRule(f"{ours}mlp_norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
            *mlp.weight_rules(config, f"{ours}mlp.", f"{theirs}mlp."),
        ]
