"""The attention seam: what a backend must offer, and the table of backends."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Array, Float

from jaxllm.config.model import ModelConfig
from jaxllm.config.plan import BatchKind

if TYPE_CHECKING:
    from jaxllm.attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Static facts of one layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # a query sees itself and the window - 1 tokens before it

    @classmethod
    def all_of(cls, config: ModelConfig) -> "tuple[AttentionSpec, ...]":
        """Every kind of attention layer in the model, once."""
        return tuple(dict.fromkeys(cls.of(config, layer) for layer in range(config.num_layers)))

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> "AttentionSpec":
        dim = config.head_dim
        heads = (config.num_heads, config.num_kv_heads, dim)
        return cls(*heads, scale=dim**-0.5, window=config.window(layer))


@dataclass(frozen=True, slots=True)
class AttentionTarget:
    """Where attention will run, and over what cache."""

    platform: str  # "cpu", "gpu"
    compute_capability: str  # "9.0"; "" where there is none
    page_size: int
    dtype: str  # of activations and cache


class AttentionBackend(Protocol):
    """All methods are pure and traced inside the step."""

    name: str

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        """None if this backend can serve the layer there, else the reason."""
        ...

    def prepare(
        self,
        metadata: "AttentionMetadata",
        kind: BatchKind,
        specs: tuple[AttentionSpec, ...],
        page_size: int,
    ) -> Any:
        """What all layers of a step share: tile maps and the like. ``specs`` holds each kind of
        layer once; they differ in the window only.
        """
        ...

    def attend(
        self,
        q: Float[Array, "T H D"],
        kv: Float[Array, "P 2 K B D"],
        metadata: "AttentionMetadata",
        shared: Any,
        spec: AttentionSpec,
    ) -> Float[Array, "T H D"]:
        """Causal attention of every token over its own row's pages. Padding tokens give finite
        values.
        """
        ...
