"""Fused rope + KV write on a GPU: correctness, in-place proof, then time beside plain XLA.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_kv_write.py``.
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

from pallas_kernels.kv_write.kv_write_sm90 import KVWriteConfig, rope_and_write_sm90
from pallas_kernels.kv_write.reference import rope_and_write_reference
from pallas_kernels.kv_write.specs import SPECS, KVWriteSpec
from pallas_kernels.kv_write.xla import rope_and_write_xla

CEILING = 4.56e12  # bytes per second, one read of 4 GiB
CONFIGS = {f"vector={n}": KVWriteConfig(n) for n in (8, 4, 2)}
TOKENS = (1, 8, 64, 256, 2048, 8192)


def inputs(spec: KVWriteSpec, tokens: int, pages: int, seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    width = (spec.heads + 2 * spec.kv_heads) * spec.dim
    slots = rng.permutation((pages - 1) * spec.page)[:tokens] + spec.page  # never page 0
    page, offset = slots // spec.page, slots % spec.page
    if tokens > 2:
        page[1] = pages  # padding
    angle = jnp.asarray(rng.uniform(0, 1000, size=(tokens, spec.dim // 2)), jnp.float32)
    qkv = jax.random.normal(key, (tokens, width), jnp.bfloat16)
    norms = [1 + 0.1 * jax.random.normal(key, (spec.dim,), jnp.bfloat16) for _ in "qk"]
    return (
        qkv,
        jnp.cos(angle),
        jnp.sin(angle),
        jnp.asarray(page, jnp.int32),
        jnp.asarray(offset, jnp.int32),
        *(norms if spec.qk_norm else ()),
    )


def cache(spec: KVWriteSpec, pages: int, seed: int = 1) -> jax.Array:
    shape = (pages, 2, spec.kv_heads, spec.page, spec.dim)
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def call(op: Callable[..., Any], args: tuple[Any, ...], kv: Any) -> Any:
    return op(*args[:5], kv, *args[5:])


def check(op: Callable[..., Any]) -> dict[str, str]:
    """Relative error per spec; what no token owns must keep its bits."""
    found = {}
    for spec in SPECS:
        args, kv = inputs(spec, 100, 37), cache(spec, 37)
        want_q, want_kv = call(rope_and_write_reference, args, kv)
        q, new = call(op, args, kv)
        pages, offsets = np.asarray(args[3]), np.asarray(args[4])
        own = pages < 37
        kept = np.ones(kv.shape, bool)
        kept[pages[own], :, :, offsets[own]] = False
        same = bool((np.asarray(new)[kept] == np.asarray(kv)[kept]).all())
        errors = [_relative(q, want_q), _relative(new, want_kv)]
        found[str(spec)] = f"q {errors[0]:.1e} kv {errors[1]:.1e} rest kept {same}"
    return found


def _relative(got: Any, want: Any) -> float:
    got = jnp.asarray(got, jnp.float32)
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(jnp.asarray(want).ravel()))


def in_place(op: Callable[..., Any]) -> str:
    """Two layers, donated caches: temporary bytes and aliased bytes of the compiled program."""
    spec = SPECS[0]
    args = inputs(spec, 64, 128)
    caches = tuple(cache(spec, 128) for _ in range(2))

    def step(caches: Any, *args: Any) -> Any:
        first, kv0 = call(op, args, caches[0])
        second, kv1 = call(op, args, caches[1])
        return (kv0, kv1), first + second

    compiled = jax.jit(step, donate_argnums=0).lower(caches, *args).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        return "no memory analysis"
    return (
        f"cache {caches[0].nbytes * 2} B, aliased {memory.alias_size_in_bytes} B, "
        f"temporary {memory.temp_size_in_bytes} B"
    )


def seconds(op: Callable[..., Any], spec: KVWriteSpec, tokens: int) -> float:
    """One layer's time: a device-side loop over layers with caches and projections of their own."""
    layers = 32 if tokens <= 256 else 6
    loops = 20 if tokens <= 256 else 5
    pages = max(256, 2 * tokens // spec.page)
    args = [inputs(spec, tokens, pages, seed) for seed in range(layers)]
    caches = tuple(cache(spec, pages) for _ in range(layers))
    q = jnp.zeros((layers, spec.heads, spec.dim), jnp.bfloat16)

    def run(caches: Any, q: Any, args: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            # Tied together, so that nothing is hoisted out of the loop.
            (caches, _q), fed = lax.optimization_barrier((carry, args))
            out = [call(op, arg, kv) for arg, kv in zip(fed, caches, strict=True)]
            return tuple(kv for _, kv in out), jnp.stack([q[-1] for q, _ in out])

        return lax.fori_loop(0, loops, body, (caches, q))

    step = jax.jit(run, donate_argnums=(0, 1))
    caches, q = step(caches, q, args)
    jax.block_until_ready(q)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        caches, q = step(caches, q, args)
        jax.block_until_ready(q)
        times.append((time.perf_counter() - start) / layers / loops)
    return statistics.median(times)


def main() -> None:
    print(jax.__version__, jax.devices()[0].device_kind)
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "times_us": {}}
    for name, config in CONFIGS.items():

        def op(*args: Any, config: KVWriteConfig = config) -> Any:
            return rope_and_write_sm90(*args, config=config)

        try:
            if name == "vector=8":
                report["check"], report["in_place"] = check(op), in_place(op)
                print(json.dumps(report["check"], indent=1), report["in_place"], sep="\n")
            report["times_us"][name] = _table(name, op)
        except Exception as error:
            print(name, "FAILED", type(error).__name__, str(error)[:600])
    try:
        print("XLA in place:", in_place(rope_and_write_xla))
        report["times_us"]["xla"] = _table("xla", rope_and_write_xla)
    except Exception as error:
        print("xla FAILED", type(error).__name__, str(error)[:600])
    if out := os.environ.get("OUT"):
        Path(out, "gpu_kv_write.json").write_text(json.dumps(report, indent=1))


def _table(name: str, op: Callable[..., Any]) -> dict[int, float]:
    spec, times = SPECS[0], {}
    for tokens in TOKENS:
        elapsed = seconds(op, spec, tokens)
        moved = 2 * tokens * (spec.heads + 2 * spec.kv_heads) * spec.dim * 2
        rate = moved / elapsed
        times[tokens] = round(elapsed * 1e6, 2)
        print(
            f"{name:10s} T={tokens:5d} {elapsed * 1e6:8.2f} us  {rate / 1e12:5.2f} TB/s "
            f"{100 * rate / CEILING:5.1f} %",
            flush=True,
        )
    return times


if __name__ == "__main__":
    main()
