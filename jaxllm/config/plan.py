"""What was decided: an EnginePlan, made once from an EngineConfig, a ModelConfig and the device."""

from dataclasses import dataclass
from enum import StrEnum

from jaxllm.config.model import ModelConfig, RowParam
from jaxllm.taps.sites import TapShapes

# What --kv-cache-dtype takes, and the dtype that it stands for; auto is that of activations.
_PAGE_DTYPES = {"auto": "", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
KV_CACHE_DTYPES = tuple(_PAGE_DTYPES)


def page_dtype(kv_cache_dtype: str, dtype: str) -> str:
    """The dtype of cached keys and values, with activations in ``dtype``."""
    return _PAGE_DTYPES[kv_cache_dtype] or dtype


class BatchKind(StrEnum):
    DECODE = "decode"  # one token per row: num_tokens == num_rows
    MIXED = "mixed"  # decode rows first, then prefill chunks


@dataclass(frozen=True, slots=True, order=True)
class BatchBucket:
    """One static shape of the step. There is no bucket on context length."""

    num_tokens: int
    num_rows: int
    kind: BatchKind

    def __str__(self) -> str:
        return f"{self.kind}[{self.num_tokens} tokens, {self.num_rows} rows]"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    model: ModelConfig
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int  # block 0 included, which nobody ever owns
    buckets: tuple[BatchBucket, ...]
    attention_backend: str
    attention_reason: str  # why this backend; logged at start
    embeddings: bool = False  # whether requests may ask for them
    prefix_caching: bool = True
    jump_forward: bool = True  # feed tokens that a grammar leaves no choice about without sampling
    prefix_cache_scope: str = "key"  # or "all": whether tenants share what they have in common
    host_blocks: int = 0  # KV blocks that the host's memory holds
    offloading: bool = False  # it takes any block that must leave, not only preempted requests'
    kv_files: bool = False  # what it takes is written to files, too
    attention_params: tuple[RowParam, ...] = ()  # what requests may bring for attention variants
    kv_cache_dtype: str = "auto"
    # Channels of a head in each layer's KV pages; () where the backend pads none.
    cache_head_dims: tuple[int, ...] = ()
    taps: bool = False  # whether requests may read and change activations

    @property
    def tap_shapes(self) -> TapShapes | None:
        """None: there are no taps."""
        m = self.model
        shapes = TapShapes(m.num_layers, m.num_heads, m.hidden_size, m.vocab_size)
        return shapes if self.taps else None

    @property
    def max_blocks_per_row(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def page_dtype(self) -> str:
        """The dtype of cached keys and values."""
        return page_dtype(self.kv_cache_dtype, self.dtype)

    @property
    def kv_identity(self) -> str:
        """What keys and values depend on beside weights and tokens."""
        how = (self.model.architecture, self.dtype, self.page_dtype, self.attention_backend)
        # Blocks hold the heads of one device after those of another.
        shards = (f"{self.model.shards} devices",) if self.model.shards > 1 else ()
        return " ".join((*how, *shards))

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds, of all requests together."""
        return (self.num_blocks - 1) * self.block_size

    def max_concurrency(self, num_tokens: int) -> float:
        """How many requests of so many tokens the KV cache holds at once."""
        return (self.num_blocks - 1) / -(-num_tokens // self.block_size)


def make_buckets(
    row_sizes: tuple[int, ...], token_sizes: tuple[int, ...], max_rows: int
) -> tuple[BatchBucket, ...]:
    """Decode buckets of ``row_sizes`` rows, mixed buckets of ``token_sizes`` tokens and
    ``max_rows`` rows.
    """
    decode = [BatchBucket(rows, rows, BatchKind.DECODE) for rows in row_sizes]
    mixed = [BatchBucket(tokens, max_rows, BatchKind.MIXED) for tokens in token_sizes]
    return tuple(decode + mixed)
