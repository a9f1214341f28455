"""Reading config.json with care: typed values, clear errors, both spellings of rope settings."""

from collections.abc import Mapping
from typing import Any

from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.errors import ConfigError
from jaxllm.layers.mlp import ACTIVATIONS


class HFConfig:
    """A config.json; every getter raises ConfigError naming the key."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"config.json: {key} must be a positive integer, got {value!r}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"config.json: {key} must be a positive number, got {value!r}.")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be true or false, got {value!r}.")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else default

    def token_ids(self, key: str) -> tuple[int, ...]:
        """eos_token_id may be one id, a list, or missing."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and item >= 0 for item in ids):
            raise ConfigError(f"config.json: {key} must be a token id or a list of them.")
        return tuple(ids)

    def rope(self, head_dim: int, *, interleaved: bool = False) -> RopeConfig:
        """Understands ``rope_parameters`` (newer) and ``rope_theta`` with ``rope_scaling``
        (older).
        """
        merged: dict[str, Any] = {"rope_theta": self.values.get("rope_theta")}
        for key in ("rope_scaling", "rope_parameters"):
            section = self.values.get(key)
            if isinstance(section, Mapping):
                merged.update(section)
        rope = HFConfig(merged)
        kind = merged.get("rope_type") or merged.get("type") or "default"
        scaling = {"default": "none", "linear": "linear", "llama3": "llama3"}.get(kind)
        if scaling is None:
            raise ConfigError(
                f"config.json: rope scaling {kind!r} is not supported (default, linear, llama3)."
            )
        partial = rope.values.get("partial_rotary_factor", self.values.get("partial_rotary_factor"))
        return RopeConfig(
            theta=rope.number("rope_theta", 10000.0),
            dim=int(head_dim * (partial or 1.0)),
            interleaved=interleaved,
            scaling=scaling,  # pyright: ignore[reportArgumentType]
            factor=rope.number("factor", 1.0),
            low_freq_factor=rope.number("low_freq_factor", 1.0),
            high_freq_factor=rope.number("high_freq_factor", 4.0),
            original_max_position=rope.integer("original_max_position_embeddings", 8192),
        )

    def model(
        self, architecture: str, *, interleaved_rope: bool = False, **switches: Any
    ) -> ModelConfig:
        """The fields that all architectures share, checked against each other."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        hidden = self.integer("hidden_size")
        head_dim = self.integer("head_dim", max(1, hidden // heads))
        activation = self.text("hidden_act", "silu")
        if heads % kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({heads}) is not a multiple of "
                f"num_key_value_heads ({kv_heads})."
            )
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"config.json: hidden_act {activation!r} is not supported "
                f"({', '.join(ACTIVATIONS)})."
            )
        bos = self.token_ids("bos_token_id")
        return ModelConfig(
            architecture=architecture,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=self.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=self.rope(head_dim, interleaved=interleaved_rope),
            norm_eps=self.number("rms_norm_eps", 1e-6),
            max_position_embeddings=self.integer("max_position_embeddings", 2048),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            hidden_act=activation,
            eos_token_ids=self.token_ids("eos_token_id"),
            bos_token_id=bos[0] if bos else None,
            dtype=self.text("dtype", self.text("torch_dtype", "bfloat16")),
            **switches,
        )

    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of every layer, from ``layer_types`` where given, else the same
        everywhere.
        """
        window = self.values.get("sliding_window")
        layers = self.integer("num_hidden_layers")
        if window is None:
            return ()
        size = self.integer("sliding_window")
        types = self.values.get("layer_types")
        if isinstance(types, list):
            if len(types) != layers:
                raise ConfigError(
                    f"config.json: layer_types has {len(types)} entries for {layers} layers."
                )
            return tuple(size if kind == "sliding_attention" else None for kind in types)
        return (size,) * layers
