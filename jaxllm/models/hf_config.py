"""Reading config.json with care: typed values, clear errors, both spellings of rope settings."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf, log
from typing import Any

from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.errors import ConfigError
from pallas_kernels.gated_matmul.activations import XLA_ACTIVATIONS

MAX_LAYERS = 1000  # every layer costs Python objects before memory is asked for


class HFConfig:
    """A config.json; every getter raises ConfigError naming the key."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1
    ) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"config.json: {key} must be an integer from {low} to {high}, got {value!r}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
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
        if value is None:
            return default
        if not isinstance(value, str):
            raise ConfigError(f"config.json: {key} must be a string, got {value!r}.")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """eos_token_id may be one id, a list, or missing."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and 0 <= item < 2**31 for item in ids):
            raise ConfigError(
                f"config.json: {key} must be a token id or a list of them, got {value!r}."
            )
        return tuple(ids)

    def rope(self, head_dim: int, *, interleaved: bool = False) -> RopeConfig:
        """Understands ``rope_parameters`` (newer) and ``rope_theta`` with ``rope_scaling``
        (older).
        """
        rope = self._rope_settings()
        dim = int(head_dim * rope.number("partial_rotary_factor", 1.0))
        if dim % 2 or not 2 <= dim <= head_dim:
            raise ConfigError(
                f"config.json: {dim} channels of a head (head_dim {head_dim}) would be rotated; it "
                "takes an even number of at least 2."
            )
        plain = RopeConfig(rope.number("rope_theta", 10000.0), dim, interleaved)
        kind = rope.text("rope_type", rope.text("type", "default"))
        if kind == "default":
            return plain
        if kind == "linear":
            return replace(plain, scaling="linear", factor=rope.number("factor"))
        if kind == "yarn":
            return _yarn(rope, plain)
        if kind != "llama3":
            raise ConfigError(
                f"config.json: rope scaling {kind!r} is not supported (default, linear, llama3, "
                "yarn)."
            )
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"config.json: low_freq_factor ({low}) must be below high_freq_factor ({high})."
            )
        return replace(
            plain,
            scaling="llama3",
            factor=rope.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=rope.integer("original_max_position_embeddings"),
        )

    def yarn_scores(self) -> float:
        """Factor of attention scores in models that take yarn's ``mscale_all_dim`` as one."""
        rope = self._rope_settings()
        all_dims = rope.values.get("mscale_all_dim")
        if rope.text("rope_type", rope.text("type", "default")) == "default" or not all_dims:
            return 1.0
        return _mscale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2

    def _rope_settings(self) -> "HFConfig":
        """All rope settings in one place; the newer section wins."""
        merged = {key: self.values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
        for key in ("rope_scaling", "rope_parameters"):
            section = self.values.get(key)
            if section is None:
                continue
            if not isinstance(section, Mapping) or any(
                isinstance(value, Mapping) for value in section.values()
            ):
                raise ConfigError(
                    f"config.json: {key} must be one set of settings for all layers, got "
                    f"{section!r}."
                )
            merged.update({name: value for name, value in section.items() if value is not None})
        return HFConfig(merged)

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
        if activation not in XLA_ACTIVATIONS:
            raise ConfigError(
                f"config.json: hidden_act {activation!r} is not supported "
                f"({', '.join(XLA_ACTIVATIONS)})."
            )
        bos = self.token_ids("bos_token_id")
        return ModelConfig(
            architecture=architecture,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=self._num_layers(),
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

    def _num_layers(self) -> int:
        return self.integer("num_hidden_layers", high=MAX_LAYERS)

    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of every layer, from ``layer_types`` where given, else the same
        everywhere.
        """
        window = self.values.get("sliding_window")
        layers = self._num_layers()
        if window is None:
            return ()
        size = self.integer("sliding_window")
        types = self.values.get("layer_types")
        if types is None:
            return (size,) * layers
        known = {"full_attention": None, "sliding_attention": size}
        if not isinstance(types, list) or not all(
            isinstance(kind, str) and kind in known for kind in types
        ):
            raise ConfigError(
                f"config.json: layer_types must be a list of {' or '.join(known)}, got {types!r}."
            )
        if len(types) != layers:
            raise ConfigError(
                f"config.json: layer_types has {len(types)} entries for {layers} layers."
            )
        return tuple(known[kind] for kind in types)


def _yarn(rope: HFConfig, plain: RopeConfig) -> RopeConfig:
    factor = rope.number("factor")
    if not rope.flag("truncate", True):
        raise ConfigError("config.json: rope scaling yarn is supported with truncate true only.")
    if plain.theta <= 1:
        raise ConfigError("config.json: rope scaling yarn needs a rope_theta above 1.")
    both = rope.values.get("mscale") and rope.values.get("mscale_all_dim")
    amplitude = _mscale(factor)
    if both:
        one, all_dims = rope.number("mscale"), rope.number("mscale_all_dim")
        amplitude = _mscale(factor, one) / _mscale(factor, all_dims)
    return replace(
        plain,
        scaling="yarn",
        factor=factor,
        original_max_position=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        amplitude=rope.number("attention_factor", amplitude),
    )


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0
