"""An fp8 KV cache on a Hopper GPU: are the kernels right, and what do eight bits save?

Run from the repository root: PYTHONPATH=. python scripts/bench/gpu_fp8_cache.py
Each operation on every shape with pages in fp8, then its time beside that of the same shape in
bfloat16, with the default config and with others. Writes fp8_cache.json into $OUT if that is set.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.attention import decode_specs, prefill_specs
from pallas_kernels.attention.decode_config import DecodeConfig
from pallas_kernels.attention.decode_problem import make_decode_problem
from pallas_kernels.attention.prefill_sm90 import default_prefill_config
from pallas_kernels.attention.prefill_tiles import PrefillConfig
from pallas_kernels.bench.ceilings import read_bytes_per_second
from pallas_kernels.bench.decode import CALLS
from pallas_kernels.bench.kv_write import (
    KVWriteOperation,
    kv_write_cache,
    kv_write_chain,
    kv_write_error,
    kv_write_inputs,
)
from pallas_kernels.bench.prefill import CALLS as PREFILL_CALLS
from pallas_kernels.bench.prefill import prefill_inputs
from pallas_kernels.bench.timing import median_seconds
from pallas_kernels.kv_write.kv_write_sm90 import rope_and_write_sm90
from pallas_kernels.kv_write.narrow import FP8
from pallas_kernels.kv_write.specs import SPECS, KVWriteBatch
from pallas_kernels.kv_write.xla import rope_and_write_xla
from scripts.bench import gpu_decode, gpu_prefill

DECODE_CONFIGS = {
    "default": DecodeConfig(),
    "4 stages": DecodeConfig(stages=4),
    "2 stages": DecodeConfig(stages=2),
    "128 x 3, 1 CTA/SM": DecodeConfig(block=128, stages=3, num_ctas=132),
    "64 x 8, 1 CTA/SM": DecodeConfig(stages=8, num_ctas=132),
}
PREFILL_CONFIGS = {
    "default": PrefillConfig(),
    "56 registers to widen": PrefillConfig(consumer_registers=224, producer_registers=56),
    "72 registers to widen": PrefillConfig(consumer_registers=216, producer_registers=72),
    "kv 64 x 3": PrefillConfig(block_kv=64, stages=3),
    "no turns": PrefillConfig(take_turns=False),
}
ROW_LENGTHS = (1, 255, 256, 257, 1000, 2048, 2049, 9000)
Results = dict[str, dict[str, Any]]


def note(results: Results, part: str, name: str, function: Callable[[], Any]) -> None:
    """One line, one entry; an error is an answer too."""
    found = gpu_decode.attempt(function)
    results.setdefault(part, {})[name] = found
    print(f"{part:16} {name:58} {found}", flush=True)
    if out := os.environ.get("OUT"):
        Path(out, "fp8_cache.json").write_text(json.dumps(results, indent=1))


def decode_us(spec: decode_specs.DecodeSpec, config: DecodeConfig, ceiling: float) -> str:
    run = gpu_decode.build(spec, config)
    seconds = median_seconds(functools.partial(run.program, *run.args), calls=CALLS)
    rate = spec.kv_bytes / seconds
    return f"{seconds * 1e6:.1f} us, {rate / 1e12:.2f} TB/s, {rate / ceiling:.1%} of reading"


def prefill_us(spec: prefill_specs.PrefillSpec, config: PrefillConfig) -> str:
    inputs = prefill_inputs(spec, PREFILL_CALLS)
    us = gpu_prefill.median_us(gpu_prefill.compiled(spec, config, inputs), *inputs)
    return f"{us:.1f} us, {spec.flops / us / 1e6:.1f} TFLOP/s"


def write_us(batch: KVWriteBatch) -> str:
    layers, loops = (32, 20) if batch.tokens <= 256 else (6, 5)
    dispatch = kv_write_chain(rope_and_write_sm90, batch, layers, loops)
    seconds = median_seconds(dispatch, calls=layers * loops)
    rate = KVWriteOperation().amount(batch) / seconds
    return f"{seconds * 1e6:.2f} us, {rate / 1e12:.2f} TB/s"


def same_as_xla(batch: KVWriteBatch) -> str:
    inputs, kv = kv_write_inputs(batch, 37), kv_write_cache(batch.spec, 37)
    by_xla = functools.partial(rope_and_write_xla, head_dim=batch.spec.dim)
    got, want = inputs.write(rope_and_write_sm90, kv)[1], inputs.write(by_xla, kv)[1]
    return f"{np.mean(np.equal(got, want)):.6%} of the cache has the bits that XLA writes"


def in_bfloat16(spec: Any, specs: tuple[Any, ...]) -> Any:
    return next(s for s in specs if s.name == spec.name.removesuffix(", fp8"))


def correctness(results: Results) -> None:
    for spec in (spec for spec in SPECS if spec.pages):
        wrong = functools.partial(kv_write_error, rope_and_write_sm90, spec)
        note(results, "write is", str(spec), lambda wrong=wrong: wrong() or "right")
        batch = KVWriteBatch(spec, 100)
        note(results, "write is", f"{spec}, bits", functools.partial(same_as_xla, batch))
    for spec in (spec for spec in decode_specs.MIXED if spec.pages == FP8):
        problem, config = make_decode_problem(spec), gpu_decode.default_of(spec)
        check = functools.partial(gpu_decode.check, spec, config, problem)
        note(results, "decode is", spec.name, check)
    row = decode_specs.DecodeSpec("", 32, 8, 128, 64, ROW_LENGTHS, pages=FP8)
    note(results, "decode is", "bits", lambda: gpu_decode.invariance(row)["all_equal"])
    for spec in (spec for spec in prefill_specs.MIXED if spec.pages):
        config = default_prefill_config(spec.heads, spec.kv_heads)
        note(results, "prefill is", spec.name, functools.partial(gpu_prefill.check, spec, config))
    for name, config in list(PREFILL_CONFIGS.items())[1:]:
        spec = next(spec for spec in prefill_specs.MIXED if spec.pages)
        check = functools.partial(gpu_prefill.check, spec, config)
        note(results, "prefill is", f"{spec.name}, {name}", check)


def speed(results: Results) -> None:
    ceiling = read_bytes_per_second()
    for spec in (spec for spec in decode_specs.SPEED if spec.pages == FP8):
        other = in_bfloat16(spec, decode_specs.SPEED)
        whole = functools.partial(decode_us, other, DecodeConfig(), ceiling)
        note(results, "decode", other.name, whole)
        for name, config in DECODE_CONFIGS.items():
            timed = functools.partial(decode_us, spec, config, ceiling)
            note(results, "decode", f"{spec.name}, {name}", timed)
    for spec in (spec for spec in prefill_specs.SPEED if spec.pages):
        other = in_bfloat16(spec, prefill_specs.SPEED)
        whole = functools.partial(prefill_us, other, PrefillConfig())
        note(results, "prefill", other.name, whole)
        for name, config in PREFILL_CONFIGS.items():
            timed = functools.partial(prefill_us, spec, config)
            note(results, "prefill", f"{spec.name}, {name}", timed)
    fp8 = next(spec for spec in SPECS if spec.pages)
    for spec in (fp8._replace(pages=None), fp8):
        for tokens in (8, 64, 8192):
            batch = KVWriteBatch(spec, tokens)
            timed = functools.partial(write_us, batch)
            note(results, "write", KVWriteOperation().label(batch), timed)


def main() -> None:
    begin = time.perf_counter()
    print(jax.__version__, jax.devices()[0].device_kind)
    defaults = dataclasses.asdict(DecodeConfig()), dataclasses.asdict(PrefillConfig())
    results: Results = {"config": {"decode": defaults[0], "prefill": defaults[1]}}
    for part in (correctness, speed):
        part(results)
        print(f"{time.perf_counter() - begin:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()
