"""``jaxllm lab bench``: the speed of an attention variant beside plain causal attention."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from pallas_kernels.attention.decode_specs import DecodeSpec
from pallas_kernels.attention.prefill_specs import PrefillSpec
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_check import make_case, why_not_lowered
from pallas_kernels.bench.operation import Timed
from pallas_kernels.bench.suite import OPERATIONS, target_platform
from pallas_kernels.tuning.table import tuned

_ROUNDS = 3  # of one after the other, so that a busy moment does not hit one of them alone


@dataclass(frozen=True)
class Heads:
    """Of the layer whose attention is timed; pages hold 64 tokens."""

    query: int = 32
    kv: int = 8
    dim: int = 128


@dataclass(frozen=True)
class Speed:
    """One shape. ``path``: the Hopper kernel or plain XLA, as the engine would choose."""

    op: Literal["decode", "prefill"]
    rows: int
    context: int
    path: Literal["kernel", "xla"]
    refused: str | None  # why not the kernel
    seconds: float
    plain_seconds: float

    @property
    def times_plain(self) -> float:
        return self.seconds / self.plain_seconds


@dataclass(frozen=True)
class _Decode(DecodeSpec):
    variant: AttentionVariant = CAUSAL  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True)
class _Prefill(PrefillSpec):
    variant: AttentionVariant = CAUSAL  # pyright: ignore[reportIncompatibleMethodOverride]


Spec = _Decode | _Prefill


def contexts() -> tuple[int, ...]:
    """That are timed if nobody names others."""
    return (128, 512, 2048) if _on_cpu() else (1024, 4096, 16384)


def measure(
    variant: AttentionVariant,
    heads: Heads,
    lengths: Iterable[int],
    progress: Callable[[str], Any] = lambda done: None,
) -> list[Speed]:
    """Decode and prefill at each context length, in bfloat16. Compiles two programs for each."""
    reason = why_not_lowered(make_case(variant.without_values(), dtype="bfloat16"))
    found: list[Speed] = []
    for context in lengths:
        for op, spec in (("decode", decode_spec), ("prefill", prefill_spec)):
            progress(f"{op} {context}")
            found.append(_speed(op, spec(heads, context, variant), context, reason))
    return found


def table(speeds: Iterable[Speed]) -> list[str]:
    lines = [f"{'':8}{'rows':>6}{'context':>9}  {'path':6}{'us':>11}{'plain us':>11}{'ratio':>8}"]
    for s in speeds:
        figures = f"{s.seconds * 1e6:>11.1f}{s.plain_seconds * 1e6:>11.1f}{s.times_plain:>8.2f}"
        lines.append(f"{s.op:8}{s.rows:>6}{s.context:>9}  {s.path:6}{figures}")
    return lines


def _speed(op: Any, spec: Spec, context: int, reason: str | None) -> Speed:
    own, refused = timed(op, spec, reason)
    plain = timed(op, type(spec)(**{**vars(spec), "variant": CAUSAL}), reason)[0]
    runs = 1 if _on_cpu() else 20
    pairs = [(own.seconds(runs), plain.seconds(runs)) for _ in range(_ROUNDS)]
    rows = len(spec.lens) if isinstance(spec, _Decode) else len(spec.rows)
    seconds, plain_seconds = (statistics.median(times) for times in zip(*pairs, strict=True))
    path = "kernel" if refused is None else "xla"
    return Speed(op, rows, context, path, refused, seconds, plain_seconds)


def timed(op: str, spec: Spec, reason: str | None) -> tuple[Timed, str | None]:
    """The form that would serve the shape, and why it is not the kernel."""
    operation, device = OPERATIONS[op], jax.devices()[0]
    default, where = operation.default(spec), operation.where(spec)
    config = tuned(op, device.device_kind, default, where=where)
    refused = operation.refuses(spec, config, target_platform())
    if refused is None and not spec.variant.is_plain:
        refused = reason
    return operation.timed(spec, config if refused is None else None), refused


def decode_spec(heads: Heads, context: int, variant: AttentionVariant) -> _Decode:
    lens = (context,) * (4 if _on_cpu() else 32)
    return _Decode("", heads.query, heads.kv, heads.dim, 64, lens, variant=variant)


def prefill_spec(heads: Heads, context: int, variant: AttentionVariant) -> _Prefill:
    """The last tokens of a prompt, as many as one step has."""
    new = min(context, 128 if _on_cpu() else 2048)
    rows = ((context - new, new),)
    return _Prefill("", heads.query, heads.kv, heads.dim, 64, rows, variant=variant)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
