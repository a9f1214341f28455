"""Fused rope + KV write on a GPU: correctness, a token's bits alone and in company, in-place proof
(of the operation, and of whole steps that serve with it), then time beside plain XLA.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_kv_write.py``.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.attention.backends.pallas import BACKEND
from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.models.params import model_def
from jaxllm.runner.programs import Programs
from pallas_kernels.bench.ceilings import read_bytes_per_second
from pallas_kernels.bench.kv_write import (
    KVWriteInputs,
    KVWriteOperation,
    kv_write_cache,
    kv_write_chain,
    kv_write_error,
    kv_write_inputs,
)
from pallas_kernels.bench.timing import median_seconds
from pallas_kernels.kv_write.kv_write_sm90 import KVWriteConfig, rope_and_write_sm90
from pallas_kernels.kv_write.specs import SPECS, SPEED, SPEED_OTHERS, KVWriteBatch
from pallas_kernels.kv_write.xla import rope_and_write_xla

CONFIGS = {f"vector={n}": KVWriteConfig(n) for n in (8, 4, 2)}


def in_place(op: Callable[..., Any]) -> str:
    """Two layers, donated caches: temporary bytes and aliased bytes of the compiled program."""
    spec = SPECS[0]
    inputs = kv_write_inputs(KVWriteBatch(spec, 64), 128)
    caches = tuple(kv_write_cache(spec, 128) for _ in range(2))

    def step(caches: Any, inputs: KVWriteInputs) -> Any:
        first, kv0 = inputs.write(op, caches[0])
        second, kv1 = inputs.write(op, caches[1])
        return (kv0, kv1), first + second

    compiled = jax.jit(step, donate_argnums=0).lower(caches, inputs).compile()
    return _verdict(compiled, caches[0].nbytes * 2)


def steps_in_place() -> dict[str, str]:
    """The same of two layers of Llama 3.1 8B as they are served, attention included."""
    rope = RopeConfig(theta=5e5, dim=128)
    model = ModelConfig("LlamaForCausalLM", 512, 4096, 14336, 2, 32, 8, 128, rope, 1e-5, 8192)
    buckets = make_buckets((64,), (512,), 64)
    plan = EnginePlan(model, "bfloat16", 8192, 64, 512, 64, 8192, buckets, BACKEND.name, "check")
    programs = Programs(plan, model_def(model, "bfloat16"), BACKEND)
    programs.compile(progress=False)
    cache_bytes = 2 * 8192 * 2 * 8 * 64 * 128 * 2
    return {str(b): _verdict(programs.forward(b).executable, cache_bytes) for b in buckets}


def _verdict(compiled: Any, cache_bytes: int) -> str:
    memory = compiled.memory_analysis()
    if memory is None:
        return "no memory analysis"
    aliased, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    good = aliased >= cache_bytes and temporary < cache_bytes / 8
    return (
        f"{'in place' if good else 'COPIED'}: cache {cache_bytes} B, aliased {aliased} B, "
        f"temporary {temporary} B"
    )


def same_bits(op: Callable[..., Any]) -> str:
    """Every token alone against all of 300 together, for all shapes."""
    differ: list[str] = []
    names = ("qkv", "cos", "sin", "pages", "offsets")
    for spec in SPECS:
        inputs, kv = kv_write_inputs(KVWriteBatch(spec, 300), 37), kv_write_cache(spec, 37)
        together, cache = inputs.write(op, kv)
        for token in (0, 7, 299):
            one = inputs._replace(**{name: getattr(inputs, name)[token, None] for name in names})
            q, new = one.write(op, kv)
            where = (int(one.pages[0]), slice(None), slice(None), int(one.offsets[0]))
            same = np.array_equal(together[token], q[0])
            same &= np.array_equal(cache[where], new[where])
            differ += [] if same else [f"{spec} token {token}"]
    return ", ".join(differ) or "a token has the same bits alone and in company"


def main() -> None:
    print(jax.__version__, jax.devices()[0].device_kind)
    ceiling = read_bytes_per_second()
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "times_us": {}}
    report["read_tb_per_s"] = ceiling / 1e12
    for name, config in CONFIGS.items():

        def op(*args: Any, config: KVWriteConfig = config) -> Any:
            return rope_and_write_sm90(*args, config=config)

        try:
            if name == "vector=8":
                report["check"] = {str(spec): kv_write_error(op, spec) or "right" for spec in SPECS}
                report["same_bits"] = same_bits(op)
                report["in_place"] = {"two writes": in_place(op), **steps_in_place()}
                shown = {key: report[key] for key in ("check", "same_bits", "in_place")}
                print(json.dumps(shown, indent=1))
            report["times_us"][name] = _table(name, op, ceiling)
            if name == "vector=8":
                report["times_us"]["heads of 80"] = _table("D=80", op, ceiling, SPEED_OTHERS)
        except Exception as error:
            print(name, "FAILED", type(error).__name__, str(error)[:600])
    try:
        print("XLA in place:", in_place(rope_and_write_xla))
        report["times_us"]["xla"] = _table("xla", rope_and_write_xla, ceiling)
    except Exception as error:
        print("xla FAILED", type(error).__name__, str(error)[:600])
    if out := os.environ.get("OUT"):
        Path(out, "gpu_kv_write.json").write_text(json.dumps(report, indent=1))


def _table(
    name: str,
    op: Callable[..., Any],
    ceiling: float,
    batches: tuple[KVWriteBatch, ...] = SPEED,
) -> dict[str, float]:
    times: dict[str, float] = {}
    for batch in batches:
        layers, loops = (32, 20) if batch.tokens <= 256 else (6, 5)
        dispatch = kv_write_chain(op, batch, layers, loops)
        elapsed = median_seconds(dispatch, calls=layers * loops)
        rate = KVWriteOperation().amount(batch) / elapsed
        label = f"{batch.tokens}{' fp8' if batch.spec.pages else ''}"
        times[label] = round(elapsed * 1e6, 2)
        print(
            f"{name:10s} T={label:>9} {elapsed * 1e6:8.2f} us  {rate / 1e12:5.2f} TB/s "
            f"{rate / ceiling:6.1%}",
            flush=True,
        )
    return times


if __name__ == "__main__":
    main()
