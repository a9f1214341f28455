"""Tile sizes of the paged decode kernel, and what it cannot serve."""

from dataclasses import dataclass

from pallas_kernels.head_dims import HEAD_DIMS
from pallas_kernels.hopper import refuses_hopper
from pallas_kernels.kv_write.narrow import FP8

PAGE_SIZES = (16, 32, 64, 128)
GROUP_TILE = 8  # query heads of one KV head are padded to a multiple of it
MAX_GROUP = 64
LATENT_GROUP = 32
# DeepSeek's, rotated channels included: two stages of that are what there is room for.
LATENT_DIM = 576
NUMBERS_ALIGN = 32
_SMEM_BYTES = 227 * 1024  # of one CTA on sm_90
_SM_BYTES = 228 * 1024  # of all CTAs of an SM, each with _CTA_BYTES of its own for the system
_CTA_BYTES = 1024
_RESERVED_BYTES = 3 * 1024  # reduction scratch and barriers


@dataclass(frozen=True)
class DecodeConfig:
    """Speed only, except the first three: they fix the order of summation and so the bits of a row.

    Raises ValueError for sizes the kernel cannot run with.
    """

    split_tokens: int = 256  # the least of a row that a CTA takes, counted from position 0
    chunk_tokens: int = 2048  # splits are joined to chunks, chunks to the row
    block: int = 64  # tokens per pipeline stage; a page larger than it is one, see block_tokens
    stages: int = 3  # K and V blocks in flight per CTA
    num_ctas: int = 264  # persistent CTAs: SMs of the card times CTAs that fit on one
    issuers: int = 1  # 1: all warps of the producer meet for every copy; 2, 4: warps deal them out

    def __post_init__(self) -> None:
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128, not {self.block}")
        if self.split_tokens < 128 or self.split_tokens % 128:
            raise ValueError(f"split_tokens must be a multiple of 128, not {self.split_tokens}")
        if self.chunk_tokens not in [self.split_tokens << shift for shift in range(1, 8)]:
            raise ValueError(
                f"chunk_tokens must be split_tokens doubled up to 7 times, not {self.chunk_tokens}"
            )
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, not {self.stages}")
        if self.num_ctas < 1:
            raise ValueError(f"num_ctas must be positive, not {self.num_ctas}")
        if self.issuers not in (1, 2, 4):
            raise ValueError(f"issuers must be 1, 2 or 4, not {self.issuers}")

    @property
    def splits_per_chunk(self) -> int:
        return self.chunk_tokens // self.split_tokens

    def block_tokens(self, page_size: int, head_dim: int) -> int:
        """Tokens of a stage. Wide heads leave no room for two stages of 128: a page of that size
        is two stages there."""
        return self.block if head_dim > 128 else max(self.block, page_size)

    def smem_bytes(
        self,
        page_size: int,
        head_dim: int,
        group: int,
        itemsize: int = 2,
        numbers: int = 0,
        value_dim: int | None = None,
    ) -> int:
        """Shared memory of one CTA, an upper bound. ``itemsize``: bytes of a number in the pages,
        2 or 1; what has one is widened in shared memory. ``numbers``: per_token params."""
        block, heads = self.block_tokens(page_size, head_dim), padded_group(group)
        if value_dim is not None:
            keys = self.stages * block + query_slots(heads, value_dim) * heads
            scores = 4 * 2 * 2 * block * heads if shares_scores(heads) else 0
            return (
                2 * (keys * head_dim + heads * (value_dim + 2 * block)) + scores + _RESERVED_BYTES
            )
        ring = self.stages * 2 * block * head_dim * itemsize
        if itemsize == 1:
            ring += 2 * block * head_dim * 2
        queries = 2 * heads * head_dim * 2
        outputs = heads * head_dim * 2
        ring += self.stages * numbers * block * 4
        return ring + queries + outputs + heads * block * 2 + _RESERVED_BYTES


def default_decode_config(
    head_dim: int,
    page_size: int,
    group: int,
    *,
    num_sms: int = 132,
    itemsize: int = 2,
    value_dim: int | None = None,
) -> DecodeConfig:
    """Two CTAs per SM, one computing while the other waits, where three stages of each fit. Of
    latents there is one, in which two warpgroups compute."""
    for ctas in (2, 1) if value_dim is None else (1,):
        room = min(_SM_BYTES // ctas - _CTA_BYTES, _SMEM_BYTES)
        fitting = [
            config
            for stages in (8, 7, 6, 5, 4, 3, 2)
            if (config := DecodeConfig(stages=stages, num_ctas=ctas * num_sms)).smem_bytes(
                page_size, head_dim, group, itemsize, value_dim=value_dim
            )
            <= room
        ]
        if fitting and (ctas == 1 or fitting[0].stages >= 3):
            return fitting[0]
    return DecodeConfig(stages=2, num_ctas=num_sms)


def padded_group(group: int) -> int:
    return -(-group // GROUP_TILE) * GROUP_TILE


def head_groups(num_heads: int, num_kv_heads: int, value_dim: int | None = None) -> int:
    """Into how many groups of query heads a row is cut: those of a KV head go together. All heads
    share a latent, but the sums of more than LATENT_GROUP would not stay in registers."""
    if value_dim is None:
        return num_kv_heads
    fitting = (n for n in range(1, num_heads + 1) if num_heads % n == 0)
    return next(n for n in fitting if num_heads // n <= LATENT_GROUP)


def query_slots(heads: int, value_dim: int | None) -> int:
    """How many items' queries are in shared memory at once; ``heads`` are those of a tile."""
    return 2 if value_dim is None or heads <= 16 else 1


def shares_scores(heads: int) -> bool:
    """Of latents: whether each consumer multiplies its own channels and hands over the sums; for
    more heads there is no room, and each makes all scores."""
    return heads <= 16


def refuses_decode_sm90(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    platform: str,
    config: DecodeConfig,
    pages: str | None = None,
    numbers: int = 0,
    value_dim: int | None = None,
) -> str | None:
    """None if the kernel takes the shape, else the reason. ``dtype`` is that of queries, ``pages``
    that of the cache; None: the same. ``numbers``: per_token params of the variant. ``value_dim``:
    of latents, whose pages hold keys alone.
    """
    pages = pages or dtype
    if (reason := refuses_hopper("the decode kernel", dtype, platform)) is not None:
        return reason
    if pages not in (dtype, FP8):
        return f"the decode kernel takes pages of the queries' dtype or of bytes, not {pages}"
    if value_dim is not None:
        reason = refuses_latents(num_kv_heads, head_dim, value_dim, pages, numbers)
        if reason is not None:
            return reason
    elif head_dim not in HEAD_DIMS:
        return f"the decode kernel takes head dims {HEAD_DIMS}, not {head_dim}"
    if pages == FP8 and head_dim > 128:
        return f"the decode kernel takes bytes in heads of up to 128 channels, not {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"the decode kernel takes page sizes {PAGE_SIZES}, not {page_size}"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads do not divide among {num_kv_heads} KV heads"
    group = num_heads // head_groups(num_heads, num_kv_heads, value_dim)
    most = MAX_GROUP if head_dim <= 128 else MAX_GROUP // 2  # sums are kept in registers
    if group > most:
        return f"the decode kernel takes up to {most} query heads per KV head, not {group}"
    reason = refuses_numbers(numbers, page_size, pages)
    if reason is not None:
        return reason
    itemsize = 2 if pages == dtype else 1
    needed = config.smem_bytes(page_size, head_dim, group, itemsize, numbers, value_dim)
    if needed > _SMEM_BYTES:
        return f"{config} needs {needed} bytes of shared memory, a CTA has {_SMEM_BYTES}"
    return None


def refuses_latents(
    num_kv_heads: int, head_dim: int, value_dim: int, pages: str, numbers: int
) -> str | None:
    """None if both kernels can attend such latents, else the reason. Each of two warpgroups sums
    half the channels, 64 at a time."""
    if num_kv_heads != 1:
        return f"the kernels take latents that all query heads share, not {num_kv_heads} of them"
    if head_dim % 64 or value_dim % 128 or not value_dim <= head_dim <= LATENT_DIM:
        return (
            "the kernels take latents of 128, 256, 384 or 512 channels that are values, in keys "
            f"of a multiple of 64 up to {LATENT_DIM}, not {value_dim} in {head_dim}"
        )
    if pages == FP8:
        return "the kernels take no latents of eight bits"
    if numbers:
        return "the kernels take no per_token params beside latents"
    return None


def refuses_numbers(count: int, page_size: int, pages: str) -> str | None:
    """None if both kernels can fetch ``count`` per_token params beside such pages, else the reason.
    A copy into shared memory starts at a multiple of 128 bytes, which 32 tokens take.
    """
    if count and page_size < NUMBERS_ALIGN:
        return (
            f"the kernels take per_token params in pages from {NUMBERS_ALIGN} on, not {page_size}"
        )
    if count and pages == FP8:
        return "the kernels take no per_token params beside pages of eight bits"
    return None
