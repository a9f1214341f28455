"""Compiled shapes: how large a step may be, and which one of the closed set it takes."""

from bisect import bisect_left
from collections.abc import Iterable

from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.errors import ConfigError, RecompilationError

# Of prefill in a step that was limited: a quarter of the smallest mixed program on a GPU. Less
# would stretch a prompt over many steps which cost hardly less.
MIN_PREFILL_TOKENS = 32


def pick_bucket(
    buckets: Iterable[BatchBucket], num_tokens: int, num_rows: int, decode_only: bool
) -> BatchBucket:
    """The smallest bucket that holds the step.

    ``decode_only``: every row feeds exactly one token. Such a step takes a DECODE bucket and only
    if none is large enough a MIXED one; any other step takes a MIXED bucket.

    Raises:
        RecompilationError: no bucket fits.
    """
    fitting = [
        bucket
        for bucket in buckets
        if bucket.num_tokens >= num_tokens
        and bucket.num_rows >= num_rows
        and (decode_only or bucket.kind is BatchKind.MIXED)
    ]
    if not fitting:
        shape = BatchBucket(
            num_tokens, num_rows, BatchKind.DECODE if decode_only else BatchKind.MIXED
        )
        raise RecompilationError(f"No compiled program holds a step of {shape}.")
    return min(fitting, key=lambda b: (b.kind is BatchKind.MIXED, b.num_tokens, b.num_rows))


def tokens_to_feed(buckets: Iterable[BatchBucket], num_tokens: int, num_decode: int) -> int:
    """How many of ``num_tokens`` a step feeds that decodes ``num_decode`` rows and prefills the
    rest.

    All of them, unless most of the program that holds them would be padding and the next smaller
    one still feeds a good part of the prefill: then as many as fill that one. What is left goes
    first in the next step. A step costs what its program costs, full or not.
    """
    sizes = sorted(b.num_tokens for b in buckets if b.kind is BatchKind.MIXED)
    holding = bisect_left(sizes, num_tokens)
    if num_tokens <= num_decode or not 0 < holding < len(sizes):
        return num_tokens
    full, held = sizes[holding - 1], sizes[holding]
    mostly_padding = 4 * (num_tokens - full) < 3 * (held - full)
    good_part = 4 * (full - num_decode) >= num_tokens - num_decode
    return full if mostly_padding and good_part else num_tokens


def lowest_limit(buckets: Iterable[BatchBucket], num_decode: int) -> int:
    """The least that a limit on a step's tokens may be with ``num_decode`` rows to decode: what
    fills the smallest program that still feeds MIN_PREFILL_TOKENS of prefill, or the largest.
    """
    sizes = sorted(b.num_tokens for b in buckets if b.kind is BatchKind.MIXED)
    return sizes[min(bisect_left(sizes, num_decode + MIN_PREFILL_TOKENS), len(sizes) - 1)]


def token_budget(plan: EnginePlan) -> int:
    """Tokens per step: what was asked for, as far as a compiled program holds it.

    Raises:
        ConfigError: the plan's shapes cannot serve its rows.
    """
    mixed = [
        b for b in plan.buckets if b.kind is BatchKind.MIXED and b.num_rows >= plan.max_num_seqs
    ]
    if not mixed:
        raise ConfigError(f"No mixed bucket has --max-num-seqs ({plan.max_num_seqs}) rows.")
    budget = min(plan.max_num_batched_tokens, max(bucket.num_tokens for bucket in mixed))
    if budget < plan.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({budget}) must be at least --max-num-seqs "
            f"({plan.max_num_seqs}), so that every running request can decode in each step."
        )
    return budget
