"""The second seam: how a layer makes queries, keys and values, what of them it keeps, and what
becomes of the answers. Which of the ATTENTION_LAYERS a model's layer has.
"""

import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Array, Float

from jaxllm.attention.user_file import from_user_file, split_name
from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.registry import Registry
from jaxllm.weights.mapping import WeightRule

if TYPE_CHECKING:
    from jaxllm.attention.backend import AttentionSpec
    from jaxllm.attention.kv_cache import LayerPages
    from jaxllm.attention.metadata import StepAttention
    from jaxllm.layers.rotary import RotaryTable

DEFAULT_LAYER = "rotary"


class AttentionLayer(Protocol):
    """A Flax NNX module. It holds parameters (in ``dtype``) and static facts; what it keeps of past
    tokens is pages of the KV cache, and nothing else.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: Any): ...

    @classmethod
    def spec_of(cls, config: ModelConfig, layer: int) -> "AttentionSpec":
        """What the backend attends, and so the shape of the layer's pages (see kv_cache.py).

        Raises:
            ConfigError: the layer cannot have this attention.
        """
        ...

    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        """Its parameters, named ``ours + NAME``, from a checkpoint's ``theirs + NAME``."""
        ...

    def __call__(
        self,
        x: Float[Array, "T E"],
        kv: "LayerPages",
        table: "RotaryTable",
        attend: "StepAttention",
    ) -> tuple[Float[Array, "T E"], "LayerPages"]:
        """The branch to be added to the residual stream, and the pages with the step's tokens in
        them. ``attend`` writes first, then attends; ``table`` has the step's rotary angles.
        """
        ...


ATTENTION_LAYERS: Registry[type[AttentionLayer]] = Registry(
    "attention layer",
    {
        DEFAULT_LAYER: "jaxllm.layers.attention:Attention",
        "nope": "jaxllm.layers.nope:NoPEAttention",
        "differential": "jaxllm.layers.differential:DifferentialAttention",
        "latent": "jaxllm.layers.latent:LatentAttention",
        "forgetting": "jaxllm.layers.forgetting:ForgettingAttention",
    },
)


@cache
def find_layer(name: str) -> type[AttentionLayer]:
    """By name, or "FILE.py:CLASS"; ":CLASS" may be left out where the file defines one layer.

    Raises:
        ConfigError: there is no such layer or file, or it is wrong.
    """
    if name in ATTENTION_LAYERS:
        return ATTENTION_LAYERS.load(name)
    file = split_name(name)
    if file is None:
        known = ", ".join(ATTENTION_LAYERS.names())
        raise ConfigError(f"There is no attention layer {name!r}; known: {known}, FILE.py:CLASS.")
    return from_user_file(*file, _is_layer, "attention layer")


def layer_class(config: ModelConfig, layer: int) -> type[AttentionLayer]:
    """Raises ConfigError as ``find_layer``."""
    return find_layer(config.attention_layer(layer) or DEFAULT_LAYER)


def computed_by(layer: object) -> tuple[str, ...]:
    """The per_token params that a layer, or a class of them, writes itself: its ``computes``. All
    others are for requests to bring."""
    return getattr(layer, "computes", ())


def layer_classes(config: ModelConfig) -> tuple[type[AttentionLayer], ...]:
    """Each class once."""
    return tuple(dict.fromkeys(layer_class(config, layer) for layer in range(config.num_layers)))


def layer_files(config: ModelConfig) -> list[Path]:
    """Of the layers that come from files of the operator's."""
    names = {config.attention_layer(layer) for layer in range(config.num_layers)}
    return sorted(file[0] for name in names if (file := split_name(name)) is not None)


def _is_layer(value: Any) -> bool:
    """A class with the seam's methods that is defined in the file, not imported by it."""
    if not inspect.isclass(value) or value.__module__.partition(".")[0] in ("jaxllm", "flax"):
        return False
    return all(hasattr(value, name) for name in ("spec_of", "weight_rules", "__call__"))
