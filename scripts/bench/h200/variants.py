"""Every attention variant beside plain causal attention at a context where it sees as much; a
window of 1,024 tokens, and a mask that shows about as many, over 65,536 beside plain attention over
what they see; and how long it takes to find what such a mask shows.

Each compiles in a thread of its own; then they are timed in turns, one after the other.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config.env import prepare_accelerator
from jaxllm.lab.bench import Heads, decode_spec, prefill_spec, timed
from pallas_kernels.attention.page_map import PageMap, decode_map, prefill_map
from pallas_kernels.attention.prefill_sm90 import default_prefill_config
from pallas_kernels.attention.prefill_tiles import make_prefill_tiles
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_check import make_case, why_not_lowered
from pallas_kernels.attention.variants import VARIANTS
from pallas_kernels.attention.variants.block_global import BLOCK_GLOBAL
from pallas_kernels.attention.variants.sliding_window import SLIDING_WINDOW
from pallas_kernels.attention.xla_spans import Sight
from pallas_kernels.bench.operation import Timed
from scripts.bench.h200.part import Part, main

CONTEXT = 4096  # the windows of our variants hide nothing yet
WINDOW, FAR = 1024, 65_536
ROUNDS = 5


def measure(part: Part) -> dict[str, Any]:
    prepare_accelerator(0.85)
    heads = Heads(4, 2, 64) if part.tiny else Heads()
    chosen = list(VARIANTS.values())
    context, window, far = (64, 32, 128) if part.tiny else (CONTEXT, WINDOW, FAR)
    if part.tiny:
        chosen = chosen[:3]
    return {
        "context": context,
        "decode": in_turns("decode", decode_spec, heads, chosen, context),
        "prefill": in_turns("prefill", prefill_spec, heads, chosen, context),
        "window": windowed(heads, window, far),
        "masked": masked(heads, window, far),
        "maps": maps(heads, far),
    }


def in_turns(
    op: str, spec: Any, heads: Heads, variants: list[AttentionVariant], context: int
) -> dict[str, Any]:
    """Microseconds of each, and plain attention's time over it."""

    def prepare(variant: AttentionVariant) -> Any:
        return timed(op, spec(heads, context, variant), why_no_kernel(variant.name))

    return figures([(variant.name, variant, prepare) for variant in variants])


@cache
def why_no_kernel(name: str) -> str | None:
    return why_not_lowered(make_case(VARIANTS[name].without_values(), dtype="bfloat16"))


def windowed(heads: Heads, window: int, far: int) -> dict[str, Any]:
    """Decode. The first entry is plain attention over as many tokens as the window shows."""
    near = SLIDING_WINDOW.bind({"window": window})
    where = [("window", near, far), (CAUSAL.name, CAUSAL, window)]
    return figures([
        (name, variant, lambda v, n=length: timed("decode", decode_spec(heads, n, v), None))
        for name, variant, length in where
    ])  # fmt: skip


def masked(heads: Heads, window: int, far: int) -> dict[str, Any]:
    """The same of a mask without a ``kv_range``, whose two blocks are as long as the window."""
    shown, seen = BLOCK_GLOBAL.bind({"block": window // 2}), window + 64
    where = [(shown.name, shown, far), (CAUSAL.name, CAUSAL, seen)]
    return figures([
        (name, variant, lambda v, n=length: timed("decode", decode_spec(heads, n, v), None))
        for name, variant, length in where
    ])  # fmt: skip


def maps(heads: Heads, far: int) -> dict[str, float]:
    """Microseconds that asking a mask takes, once for all layers of a step."""
    decode, prefill = decode_spec(heads, far, BLOCK_GLOBAL), prefill_spec(heads, far, BLOCK_GLOBAL)
    lens = jnp.asarray(decode.lens, jnp.int32)
    starts = jnp.asarray([0, prefill.rows[0][1]], jnp.int32)
    config = default_prefill_config(heads.query, heads.kv, heads.dim)

    def of_decode(lens: jax.Array) -> PageMap:
        sight = Sight(None, BLOCK_GLOBAL, None, decode.page, (len(lens), decode.width))
        return decode_map(lens, heads.query, sight, decode.page)

    def of_prefill(lens: jax.Array) -> PageMap:
        tiles = make_prefill_tiles(starts, lens, jnp.int32(0), prefill.tokens, config)
        sight = Sight(None, BLOCK_GLOBAL, None, prefill.page, (1, decode.width))
        return prefill_map(tiles, heads.query, sight, config)

    found: dict[str, float] = {}
    for name, function, given in (("decode", of_decode, lens), ("prefill", of_prefill, lens[:1])):
        program = jax.jit(function)
        timed_program = Timed(lambda program=program, given=given: program(given), 1)
        found[name] = timed_program.seconds(5) * 1e6
    return found


def figures(entries: list[tuple[str, AttentionVariant, Any]]) -> dict[str, Any]:
    def build(entry: tuple[str, AttentionVariant, Any]) -> tuple[Any, str | None] | str:
        _, variant, prepare = entry
        try:
            found = prepare(variant)
            jax.block_until_ready(found[0].dispatch())
        except Exception as error:  # one that fails must not hide the others
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return found

    with ThreadPoolExecutor(6) as pool:
        built = list(pool.map(build, entries))
    runs = 1 if jax.default_backend() == "cpu" else 20
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for _ in range(ROUNDS):
        for (name, *_), found in zip(entries, built, strict=True):
            if isinstance(found, str):
                failures[name] = found
            else:
                times.setdefault(name, []).append(found[0].seconds(runs))
    plain = times.get(CAUSAL.name)
    report: dict[str, Any] = {name: {"failure": text} for name, text in failures.items()}
    for (name, *_), found in zip(entries, built, strict=True):
        if isinstance(found, str) or plain is None:
            continue
        ratios = [p / own for p, own in zip(plain, times[name], strict=True)]
        report[name] = {
            "us": statistics.median(times[name]) * 1e6,
            "of_plain": statistics.median(ratios),
            "refused": found[1],
        }
    return report


if __name__ == "__main__":
    main(measure)
