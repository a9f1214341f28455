"""Compiled shapes: how large a step may be, and which one of the closed set it takes."""

from collections.abc import Iterable

from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.errors import ConfigError, RecompilationError


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
