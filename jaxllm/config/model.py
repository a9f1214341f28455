"""What a model is: shapes and switches read from its config.json. Frozen, hashable, static under
jit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from jaxllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    ``scaling`` "llama3" rescales frequencies by wavelength (Llama 3.1), "yarn" too, and all that is
    turned by ``amplitude`` (arXiv:2309.00071), "linear" divides positions.
    ``dim`` is the number of rotated channels of each head; the rest passes unrotated.
    ``interleaved``: pairs are (0,1),(2,3)... (GLM) instead of (0,D/2),(1,D/2+1)... (Llama).
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    amplitude: float = 1.0


def _frozen(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    parts = cast(Sequence[Any], value)
    return tuple(_frozen(part) for part in parts)


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The attention variant of one layer, and values of its params: numbers or nested tuples.
    ``layer``: "" for the model's own attention layer."""

    variant: str
    values: tuple[tuple[str, Any], ...] = ()
    layer: str = ""

    def __post_init__(self) -> None:
        """What comes from JSON has lists, which have no hash."""
        object.__setattr__(self, "values", _frozen(self.values))


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2): ranks of the projections, channels of a head."""

    q_rank: int | None  # None: queries are not compressed
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    score_factor: float = 1.0  # of scores, beside the root of a head's channels


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Mixtures of experts in place of the layers' dense blocks, from ``first_layer`` on.

    ``scoring`` "sigmoid" has a learned bias for the choice alone, and finds a group as good as its
    two best (DeepSeek-V3); "softmax" as its best.
    """

    first_layer: int
    count: int
    chosen: int  # per token
    size: int  # inner channels of each
    shared_size: int  # of those that every token takes, together
    factor: float  # of the weights of the chosen
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False  # whether these weights are brought to a sum of one before
    groups: int = 1
    groups_chosen: int = 1  # all chosen are of these

    @property
    def inner_size(self) -> int:
        return self.count * self.size + self.shared_size


@dataclass(frozen=True, slots=True)
class RowParam:
    """What a request may bring for attention variants."""

    name: str
    size: int | None  # None: one number, else a list of so many
    whole: bool  # numbers only
    longest: int | None = None  # of a span of first tokens that see ahead: fed in one step
    per_token: bool = False  # a list: a number for each of the prompt's first tokens


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. Built by ``config_from_hf`` of the file in jaxllm/models."""

    architecture: str  # class name in config.json, a key of jaxllm.models.MODELS
    vocab_size: int  # rows of the embedding = width of the logits
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False  # GLM-4-0414: a norm after attention and after the MLP too
    sliding_windows: tuple[int | None, ...] = ()  # per layer; () means none anywhere
    attention_layers: tuple[str, ...] = ()  # names per layer; () means the default everywhere
    attention: tuple[AttentionChoice, ...] = ()  # per layer, as the user asked; () means nothing
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "bfloat16"  # what the checkpoint was saved in
    # How many devices the model is shared out over: heads and inner channels are those of one.
    shards: int = 1

    def part(self, shards: int) -> "ModelConfig":
        """What each of so many devices has of this model.

        Raises:
            ConfigError: it cannot be shared out like that.
        """
        if shards == 1:
            return self
        reason = self._refuses_parts(shards)
        if reason is not None:
            raise ConfigError(f"--tensor-parallel-size {shards}: {reason}.")
        return replace(
            self,
            num_heads=self.num_heads // shards,
            num_kv_heads=self.num_kv_heads // shards,
            intermediate_size=self.intermediate_size // shards,
            shards=shards,
        )

    @property
    def whole(self) -> "ModelConfig":
        """The model that this is a part of."""
        return replace(
            self,
            num_heads=self.num_heads * self.shards,
            num_kv_heads=self.num_kv_heads * self.shards,
            intermediate_size=self.intermediate_size * self.shards,
            shards=1,
        )

    def _refuses_parts(self, shards: int) -> str | None:
        if self.latent is not None:
            return "latent attention keeps one vector for all heads: it runs on one device only"
        if self.experts is not None:
            return "experts cannot be shared out yet: such a model runs on one device only"
        for name, count in (
            ("num_key_value_heads", self.num_kv_heads),
            ("num_attention_heads", self.num_heads),
            ("intermediate_size", self.intermediate_size),
            ("hidden_size", self.hidden_size),
        ):
            if count % shards:
                return f"it must divide the model's {name} ({count})"
        return None

    @property
    def widest_block(self) -> int:
        """Inner channels of the widest feed-forward block."""
        return max(self.intermediate_size, self.experts.inner_size if self.experts else 0)

    def window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    def attention_layer(self, layer: int) -> str:
        """Its name; "" for the default."""
        asked = self.attention[layer].layer if self.attention else ""
        return asked or (self.attention_layers[layer] if self.attention_layers else "")
