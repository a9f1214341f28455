"""Truncated sampling on a Hopper GPU: the kernels' tokens against the reference's, then times.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_sampling.py``. Takes less than
a minute, and ends with status 1 if a token is wrong.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.bench.timing import median_seconds
from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.draw_sm90 import draw_sm90
from pallas_kernels.sampling.noise import row_keys
from pallas_kernels.sampling.reference import sample_reference, thresholds_reference
from pallas_kernels.sampling.sample_sm90 import SampleConfig, Truncation, thresholds_sm90
from pallas_kernels.sampling.scan_sm90 import scan_sm90

MODES = {  # temperature, top_k, top_p, min_p
    "plain": (1.0, 0, 1.0, 0.0),
    "p0.9": (0.8, 0, 0.9, 0.0),
    "k50": (1.0, 50, 1.0, 0.0),
    "k50 p0.9": (0.8, 50, 0.9, 0.0),
    "min_p0.05": (1.0, 0, 1.0, 0.05),
    "greedy": (0.0, 0, 1.0, 0.0),
    "hot p0.99": (2.0, 0, 0.99, 0.0),
    "k3000": (1.0, 3000, 1.0, 0.0),
    "k20000 p0.95 min_p": (1.5, 20000, 0.95, 1e-4),
}
SPREADS = {"peaked": 4.0, "flat": 1.0}  # standard deviation of the logits
MIXES = [(mode, spread) for mode in MODES for spread in SPREADS]  # dealt to the rows in turn
VOCABS = (128256, 49152)
ROWS = 256
SEEDS = 4
BUFFERS = 4  # batches of a chain: of 64 rows 131 MB, more than the L2 cache holds
CALLS, QUEUED, RUNS = 8, 20, 5

Inputs = tuple[jax.Array, Truncation, jax.Array, jax.Array]


def inputs(rows: int, vocab: int, seed: int, mixes: list[tuple[str, str]]) -> Inputs:
    """Logits, parameters, seeds and positions; row i is of the i-th mix."""
    dealt = [mixes[row % len(mixes)] for row in range(rows)]
    spread = jnp.asarray([SPREADS[spread] for _, spread in dealt], jnp.float32)
    logits = spread[:, None] * jax.random.normal(jax.random.key(seed), (rows, vocab), jnp.float32)
    temperature, top_k, top_p, min_p = zip(*(MODES[mode] for mode, _ in dealt), strict=True)
    rest = Truncation(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
    )
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, 2))
    return logits, rest, jnp.asarray(words, jnp.int32), jnp.arange(rows, dtype=jnp.int32) + 1000


def part(batch: Inputs, rows: slice) -> Inputs:
    return jax.tree.map(lambda leaf: leaf[rows], batch)


@jax.jit
def kernels(logits: Any, rest: Truncation, seed: Any, position: Any) -> jax.Array:
    return sample(logits, *rest, seed, position, platform="sm_90")


@jax.jit
def wrong_rows(batch: Inputs, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By row: whether the token differs from the reference's, and the tokens that only one of the
    two keeps, and that the reference keeps."""
    logits, rest, seed, position = batch
    scale = jnp.where(rest.temperature == 0, 1.0, rest.temperature)
    threshold = thresholds_sm90(logits, rest._replace(temperature=scale), config=SampleConfig())
    x = logits / scale[:, None]
    kept = x >= thresholds_reference(x, *rest[1:])[:, None]
    differing = ((logits >= threshold[:, None]) != kept).sum(axis=1)
    want = sample_reference(logits, *rest, seed, position)
    return tokens != want, differing, kept.sum(axis=1)


def check(vocab: int) -> tuple[dict[str, str], bool]:
    """What was found by mix, and whether all is right. Sums of weights round, and so does division
    by temperature: a token at the very edge may be kept by one only. That is told, and is no error
    as long as it is one, or one of a thousand."""
    by_mix: dict[str, list[np.ndarray]] = {}
    right = True
    for seed in range(SEEDS):
        batch = inputs(ROWS, vocab, seed, MIXES)
        tokens = np.asarray(kernels(*batch))
        found = np.stack([np.asarray(column) for column in wrong_rows(batch, tokens)], axis=1)
        for index, (mode, spread) in enumerate(MIXES):
            by_mix.setdefault(f"{spread} {mode}", []).append(found[index :: len(MIXES)])
        by_64 = [np.asarray(kernels(*part(batch, slice(i, i + 64)))) for i in range(0, ROWS, 64)]
        alone = [
            int(kernels(*part(batch, slice(i, i + 1)))[0]) for i in range(min(ROWS, 2 * len(MIXES)))
        ]
        for name, other in (("64", np.concatenate(by_64)), ("alone", np.asarray(alone))):
            differing = np.flatnonzero(other != tokens[: len(other)])
            if differing.size:
                right = False
                print(f"{vocab}: rows {differing.tolist()} differ between {ROWS} and {name}")
    report: dict[str, str] = {}
    for name, parts in by_mix.items():
        rows = np.concatenate(parts)
        token_differs, at_edge, kept = rows.T
        right &= not (token_differs & (at_edge == 0)).any()
        right &= bool((at_edge <= 1 + kept / 1000).all())
        report[name] = (
            f"tokens differing {token_differs.sum()}/{len(rows)}, kept on average "
            f"{kept.mean():.0f}, kept by one only {at_edge.sum()}"
        )
    return report, right


class Chain:
    """One program of calls that each wait for the one before; takes parameters of any mix."""

    def __init__(self, op: Callable[..., jax.Array], rows: int, vocab: int):
        self.rows, self.vocab = rows, vocab

        def run(batches: list[Inputs]) -> jax.Array:
            token = jnp.zeros((rows,), jnp.int32)
            for call in range(CALLS):
                batch, token = lax.optimization_barrier((batches[call % BUFFERS], token))
                token = op(*batch)
            return token

        self.program = jax.jit(run)

    def microseconds(self, mix: tuple[str, str]) -> float:
        batches = [inputs(self.rows, self.vocab, seed, [mix]) for seed in range(BUFFERS)]
        seconds = median_seconds(
            lambda: self.program(batches), calls=CALLS, queued=QUEUED, runs=RUNS
        )
        return round(1e6 * seconds, 1)


def scan_only(logits: Any, rest: Truncation, seed: Any, position: Any) -> jax.Array:
    searched = jnp.ones(position.shape, jnp.int32)
    tops, _ = scan_sm90(logits, rest.temperature, searched, config=SampleConfig())
    return tops[:, 0, 0, 0].astype(jnp.int32)


def search_only(logits: Any, rest: Truncation, seed: Any, position: Any) -> jax.Array:
    return thresholds_sm90(logits, rest, config=SampleConfig()).astype(jnp.int32)


def draw_only(logits: Any, rest: Truncation, seed: Any, position: Any) -> jax.Array:
    """Of about 50 tokens a row."""
    edge, noisy = jnp.full(position.shape, 13.4), jnp.ones(position.shape, jnp.int32)
    keys, config = row_keys(seed, position), SampleConfig()
    return draw_sm90(logits, rest.temperature, edge, noisy, keys, config=config)


def timings(vocab: int) -> dict[str, float]:
    peaked = [(mode, "peaked") for mode in ("plain", "p0.9", "k50", "k50 p0.9", "greedy")]
    wide = [("p0.9", "flat"), ("k3000", "peaked")]
    runs: list[tuple[str, Callable[..., jax.Array], int, list[tuple[str, str]]]] = [
        ("kernels", kernels, 64, peaked + wide),
        ("kernels", kernels, 256, peaked + wide),
        ("kernels", kernels, 1, [("plain", "peaked"), ("k50 p0.9", "peaked"), ("p0.9", "flat")]),
        ("scan alone", scan_only, 64, [("k50 p0.9", "peaked")]),
        ("search alone", search_only, 64, [("k50 p0.9", "peaked")]),
        ("draw alone", draw_only, 64, [("k50 p0.9", "peaked")]),
    ]
    found: dict[str, float] = {}
    for name, op, rows, mixes in runs:
        chain = Chain(op, rows, vocab)
        for mode, spread in mixes:
            label = f"{name} {rows} x {vocab}, {spread} {mode}"
            found[label] = chain.microseconds((mode, spread))
            rate = rows * vocab * 4 / found[label] / 1e6
            print(f"{label:52s} {found[label]:8.1f} us  {rate:5.2f} TB/s of one read", flush=True)
    return found


def main() -> None:
    device = jax.devices()[0]
    print(jax.__version__, device.device_kind)
    report: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "check": {}}
    right = True
    for vocab in VOCABS:
        report["check"][vocab], good = check(vocab)
        right &= good
        print(vocab, json.dumps(report["check"][vocab], indent=1), flush=True)
    report["us"] = timings(VOCABS[0])
    report["right"] = right
    if out := os.environ.get("OUT"):
        Path(out, "gpu_sampling.json").write_text(json.dumps(report, indent=1))
    if not right:
        sys.exit("FAILED: see above which tokens are wrong")


if __name__ == "__main__":
    main()
