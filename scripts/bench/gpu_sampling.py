"""Truncated sampling on a GPU: correctness, then time of the kernels beside plain XLA.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_sampling.py``.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.sampling.noise import gumbel, row_keys
from pallas_kernels.sampling.reference import sample_reference, thresholds_reference
from pallas_kernels.sampling.sample_sm90 import (
    SampleConfig,
    Truncation,
    draw_sm90,
    sample_sm90,
    search_sm90,
)
from pallas_kernels.sampling.xla import sample_xla

CEILING = 4.56e12  # bytes per second, one read of 4 GiB
ROWS, VOCAB = 64, 128256
BUFFERS = 4  # 131 MB of logits: more than the L2 cache holds
QUEUED = 20  # programs dispatched before the host waits, so that the device is never idle
CONFIGS = [SampleConfig(s, u) for s, u in ((8, 4), (8, 8), (16, 4), (4, 8), (8, 2), (16, 2))]
MODES = {  # temperature, top_k, top_p, min_p
    "k50 p0.9": (0.8, 50, 0.9, 0.0),
    "k50": (1.0, 50, 1.0, 0.0),
    "p0.9": (0.8, 0, 0.9, 0.0),
    "min_p0.1": (1.0, 0, 1.0, 0.1),
    "plain": (1.0, 0, 1.0, 0.0),
    "greedy": (0.0, 0, 1.0, 0.0),
}
SPREADS = {"peaked": 4.0, "flat": 1.0}  # standard deviation of the logits


def truncation(mode: str, rows: int) -> Truncation:
    temperature, top_k, top_p, min_p = MODES[mode]
    return Truncation(
        jnp.full((rows,), temperature, jnp.float32),
        jnp.full((rows,), top_k, jnp.int32),
        jnp.full((rows,), top_p, jnp.float32),
        jnp.full((rows,), min_p, jnp.float32),
    )


def inputs(rows: int, vocab: int, spread: float, seed: int) -> tuple[jax.Array, ...]:
    logits = spread * jax.random.normal(jax.random.key(seed), (rows, vocab), jnp.float32)
    words = jnp.asarray(np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, 2)), jnp.int32)
    return logits, words, jnp.arange(rows, dtype=jnp.int32) + 1000


def check(config: SampleConfig) -> dict[str, str]:
    found = {}
    for name, spread in SPREADS.items():
        for mode in MODES:
            logits, seed, position = inputs(ROWS, VOCAB, spread, 7)
            rest = truncation(mode, ROWS)
            want = jax.jit(sample_reference)(logits, *rest, seed, position)
            got = sample_sm90(logits, rest, seed, position, config=config)
            alone = sample_sm90(
                logits[3:4],
                jax.tree.map(lambda leaf: leaf[3:4], rest),
                seed[3:4],
                position[3:4],
                config=config,
            )
            scale = jnp.where(rest.temperature == 0, 1.0, rest.temperature)
            scaled = rest._replace(temperature=scale)
            threshold, exact = search_sm90(logits, scaled, config=config)
            x = logits / scale[:, None]
            edge = thresholds_reference(x, *rest[1:])
            wrong = ((logits >= threshold[:, None]) != (x >= edge[:, None])).sum(axis=1)
            found[f"{name} {mode}"] = (
                f"tokens differing {int((got != want).sum())}/{ROWS}, told from groups "
                f"{int(exact.sum())}, kept-set differences there {int(wrong[exact].sum())}, "
                f"kept on average {float((x >= edge[:, None]).sum(1).mean()):.0f}, "
                f"row alone equal {bool(alone[0] == got[3])}"
            )
    return found


def seconds(op: Callable[..., Any], rows: int, vocab: int, spread: float, rest: Any) -> float:
    """One call's time, out of a program of several; each waits for the one before."""
    batches = [inputs(rows, vocab, spread, seed) for seed in range(BUFFERS)]

    @jax.jit
    def run(batches: Any, rest: Any) -> jax.Array:
        token = jnp.zeros((rows,), jnp.int32)
        for batch in batches:
            fed, rest, token = lax.optimization_barrier((batch, rest, token))
            token = op(fed[0], rest, *fed[1:])
        return token

    jax.block_until_ready(run(batches, rest))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([run(batches, rest) for _ in range(QUEUED)])
        times.append((time.perf_counter() - start) / BUFFERS / QUEUED)
    return statistics.median(times)


def line(name: str, rows: int, vocab: int, elapsed: float) -> float:
    rate = rows * vocab * 4 / elapsed
    print(
        f"{name:44s} {rows:4d} x {vocab} {elapsed * 1e6:8.1f} us  {rate / 1e12:5.2f} TB/s of one "
        f"read, {100 * rate / CEILING:5.1f} %",
        flush=True,
    )
    return round(elapsed * 1e6, 1)


def kernel(config: SampleConfig) -> Callable[..., Any]:
    return lambda x, rest, seed, position: sample_sm90(x, rest, seed, position, config=config)


def xla(bits: int) -> Callable[..., Any]:
    def op(x: Any, rest: Truncation, seed: Any, position: Any) -> jax.Array:
        return sample_xla(x, *rest, seed, position, bits=bits)

    return op


def search_only(config: SampleConfig) -> Callable[..., Any]:
    def op(x: Any, rest: Any, seed: Any, position: Any) -> jax.Array:
        return search_sm90(x, rest, config=config)[0].astype(jnp.int32)

    return op


def draw_only(config: SampleConfig, kept: float) -> Callable[..., Any]:
    """The third launch alone; ``kept``: threshold in standard deviations."""

    def op(x: Any, rest: Any, seed: Any, position: Any) -> jax.Array:
        edge, noisy = jnp.full((x.shape[0],), kept), jnp.ones((x.shape[0],), jnp.int32)
        keys = row_keys(seed, position)
        return draw_sm90(x, rest.temperature, edge, noisy, keys, config=config)

    return op


def threefry_argmax(x: Any, rest: Any, seed: Any, position: Any) -> jax.Array:
    keys = row_keys(seed, position)
    token = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.uint32)[None], x.shape)
    return jnp.argmax(x + gumbel(keys[:, :1], keys[:, 1:], token), axis=-1).astype(jnp.int32)


def hashed_argmax(x: Any, rest: Any, seed: Any, position: Any) -> jax.Array:
    """As above with a cheap hash (two multiply-xorshift rounds) instead of threefry: what noise
    would cost then. Not proposed as it stands."""
    keys = row_keys(seed, position)
    h = jnp.arange(x.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(0x9E3779B9) + keys[:, :1]
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D) ^ keys[:, 1:]
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    h = h ^ (h >> 16)
    uniform = lax.bitcast_convert_type((h >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    noise = -jnp.log(-jnp.log(jnp.maximum(uniform, 1.1754944e-38)))
    return jnp.argmax(x + noise, axis=-1).astype(jnp.int32)


def runs() -> list[tuple[str, Callable[..., Any], int, int, str, str]]:
    """Name, operation, rows, vocabulary, mode, spread; what matters most comes first."""
    best = CONFIGS[0]
    full = (ROWS, VOCAB)
    listed: list[tuple[str, Callable[..., Any], int, int, str, str]] = [
        (f"kernels {c}", kernel(c), *full, "k50 p0.9", "peaked") for c in CONFIGS[:3]
    ]
    listed += [(f"search alone {c}", search_only(c), *full, "k50 p0.9", "peaked") for c in CONFIGS]
    listed += [
        ("draw alone, ~50 kept", draw_only(best, 13.4), *full, "k50", "peaked"),
        ("draw alone, all kept", draw_only(best, -99.0), *full, "k50", "peaked"),
    ]
    listed += [
        (f"XLA {bits} bits a pass", xla(bits), *full, "k50 p0.9", "peaked") for bits in (4, 2, 1)
    ]
    listed += [
        ("XLA threefry noise + argmax", threefry_argmax, *full, "plain", "peaked"),
        ("XLA cheap hash noise + argmax", hashed_argmax, *full, "plain", "peaked"),
    ]
    for mode in MODES:
        listed += [(f"kernels {mode} {s}", kernel(best), *full, mode, s) for s in SPREADS]
    for rows in (1, 8, 256):
        listed.append(("kernels", kernel(best), rows, VOCAB, "k50 p0.9", "peaked"))
    listed += [("kernels", kernel(best), ROWS, v, "k50 p0.9", "peaked") for v in (151936, 32000)]
    return listed


def main() -> None:
    print(jax.__version__, jax.devices()[0].device_kind)
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "us": {}}
    try:
        report["check"] = check(CONFIGS[0])
        print(json.dumps(report["check"], indent=1))
    except Exception as error:
        print("check FAILED", type(error).__name__, str(error)[:600])
    for name, op, rows, vocab, mode, spread in runs():
        try:
            elapsed = seconds(op, rows, vocab, SPREADS[spread], truncation(mode, rows))
            report["us"][f"{name} {rows}x{vocab}"] = line(name, rows, vocab, elapsed)
        except Exception as error:
            print(name, "FAILED", type(error).__name__, str(error)[:600])
    if out := os.environ.get("OUT"):
        Path(out, "gpu_sampling.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
