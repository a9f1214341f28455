"""The kernels that have a figure to keep, each beside the device's ceilings of the same run, and
what a call of chunked prefill takes of the device's memory beside its arguments and result.
"""

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config.env import prepare_accelerator
from pallas_kernels.attention.prefill_sm90 import default_prefill_config, paged_prefill_sm90
from pallas_kernels.attention.prefill_specs import SMALL, SPEED, PrefillSpec
from pallas_kernels.attention.prefill_tiles import make_prefill_tiles
from pallas_kernels.bench.ceilings import measure_ceilings
from pallas_kernels.bench.prefill import prefill_inputs
from pallas_kernels.bench.suite import cases, target_platform
from pallas_kernels.bench.suite import measure as measure_case
from scripts.bench.h200.part import Part, main

SHAPES = {
    "decode": ("B32 x 4096", "B8 x 8192", "B64 x 1024", "B1 x 65536", "B256 x 1024"),
    "prefill": ("8192 from scratch", "8 x 1024"),
    "kv_write": ("256 tokens, 32/8 heads of 128", "8192 tokens, 32/8 heads of 128"),
    "sampling": ("64 x 128256", "256 x 128256"),
    "gated_matmul": ("256 x 4096 x 2 x 14336", "8192 x 4096 x 2 x 14336"),
}


def measure(part: Part) -> dict[str, Any]:
    prepare_accelerator(0.85)
    chosen = [case for case in cases(SHAPES) if part.tiny or case.shape in SHAPES[case.op]]
    if part.tiny:  # one of each
        chosen = list({case.op: case for case in chosen}.values())
    memory = prefill_memory(SMALL[0] if part.tiny else SPEED[0])
    ceilings = measure_ceilings()
    rows = [asdict(measure_case(case, ceilings)) for case in chosen]
    return {"ceilings": ceilings._asdict(), "rows": rows, "prefill_memory": memory}


def prefill_memory(spec: PrefillSpec) -> dict[str, Any]:
    """Bytes. Where the kernel cannot run it is lowered only, and its temporaries are not known."""
    _, problem = prefill_inputs(spec, 1)
    config = default_prefill_config(spec.heads, spec.kv_heads)

    def attend(problem: Any) -> jax.Array:
        q, kv, tables, starts, lens, num_decode_rows = problem
        tiles = make_prefill_tiles(starts, lens, num_decode_rows, spec.tokens, config)
        return paged_prefill_sm90(
            q,
            kv,
            tables,
            tiles,
            jnp.empty_like(q),
            scale=spec.dim**-0.5,
            variant=spec.variant,
            config=config,
        )

    traced = jax.jit(attend).trace(problem)
    seen = sum(cached + new for cached, new in spec.rows)
    found: dict[str, Any] = {"spec": spec.name}
    found["gathered_kv"] = seen * 2 * spec.kv_heads * spec.dim * problem.kv.dtype.itemsize
    if target_platform() != "sm_90":
        traced.lower(lowering_platforms=("cuda",))
        return found | {"temporary": None}
    memory = traced.lower().compile().memory_analysis()
    return found | {"temporary": None if memory is None else memory.temp_size_in_bytes}


if __name__ == "__main__":
    main(measure)
