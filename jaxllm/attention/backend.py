"""The attention seam: what a backend must offer, and what it is told of a layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from jaxllm.attention.layers import layer_class
from jaxllm.config.model import ModelConfig
from jaxllm.config.plan import BatchKind
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import TokenValues

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
    variant: AttentionVariant = CAUSAL
    # Pages hold keys alone, and values are the first so many channels of them.
    value_dim: int | None = None

    @classmethod
    def all_of(cls, config: ModelConfig) -> "tuple[AttentionSpec, ...]":
        """Every kind of attention layer in the model, once."""
        return tuple(dict.fromkeys(cls.of(config, layer) for layer in range(config.num_layers)))

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> "AttentionSpec":
        return layer_class(config, layer).spec_of(config, layer)


@dataclass(frozen=True, slots=True)
class AttentionTarget:
    """Where attention will run, and over what cache."""

    platform: str  # "cpu", "gpu"
    compute_capability: str  # "9.0"; "" where there is none
    page_size: int
    dtype: str  # of activations
    device_kind: str = ""  # "NVIDIA H200": whose tuned configs to use
    page_dtype: str = ""  # of the cache; "": that of activations


class HeadTransform(NamedTuple):
    """What happens to the heads of a fused projection before they are attended: RMS norm of every
    query and key head if there are weights, then rotation of its first ``2 F`` channels.
    """

    cos: Float[Array, "T F"]  # float32, of the step's tokens; the same arrays in every layer
    sin: Float[Array, "T F"]
    interleaved: bool  # channel 2 i turns with 2 i + 1 (GLM) instead of i with i + F (Llama)
    q_norm: Float[Array, " D"] | None
    k_norm: Float[Array, " D"] | None
    eps: float


class SlotMapping(NamedTuple):
    """Where each token's key and value go. Padding has a page that is none of the cache's."""

    pages: Int[Array, " T"]
    offsets: Int[Array, " T"]


class AttentionBackend(Protocol):
    """All methods are pure and traced inside the step."""

    name: str

    def on(self, target: AttentionTarget) -> "AttentionBackend":
        """The backend with what it knows of the device there. Raises ConfigError."""
        ...

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        """None if this backend can serve the layer there, else the reason."""
        ...

    def cache_head_dim(self, head_dim: int) -> int:
        """Channels that a head has in this backend's KV pages: its own, or more with zeros behind.
        The only owner of that choice."""
        ...

    def prepare(
        self,
        metadata: "AttentionMetadata",
        kind: BatchKind,
        specs: tuple[AttentionSpec, ...],
        page_size: int,
    ) -> Any:
        """What all layers of a step share: tile maps and the like. ``specs`` holds each kind of
        layer once.
        """
        ...

    def write(
        self,
        qkv: Float[Array, "T C"],
        kv: Float[Array, "P 2 K B W"],
        slots: SlotMapping,
        heads: HeadTransform,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "T H W"], Float[Array, "P 2 K B W"]]:
        """Normed and rotated queries, and the cache with the step's keys and values in it. ``qkv``
        holds the heads of q, then k, then v: ``C = (H + 2 K) D``. Padding tokens are not written.
        W is ``cache_head_dim(D)``; channels from D on are zero.
        """
        ...

    def attend(
        self,
        q: Float[Array, "T H W"] | Float[Array, "T H D"],
        kv: Float[Array, "P S K B W"],
        metadata: "AttentionMetadata",
        shared: Any,
        spec: AttentionSpec,
        tokens: TokenValues | None = None,
    ) -> Float[Array, "T H V"]:
        """Causal attention of every token over its own row's pages, of queries as ``write`` gives
        them or without padding. ``tokens``: of a variant with per_token params. Padding tokens give
        finite values.
        """
        ...
