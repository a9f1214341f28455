"""What a first start on a GPU has to trace and lower, program by program: without a GPU.

    lowering.py [MODEL] [--helpers 0] [--device "NVIDIA H200"] [--json FILE]

MODEL is a directory with a config.json (configs/models/llama-3.1-8b). Everything is as an engine
with default settings has it, but for the number of KV blocks, which changes no text but shapes.
Prints seconds, kilobytes of the lowered form, and how many kernels are inside; with ``--helpers``
processes share the work, as they do in an engine.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.select import cache_head_dims, select_backend
from jaxllm.config.engine import EngineConfig
from jaxllm.models.params import model_def
from jaxllm.runner.lowering_cache import jax_settings
from jaxllm.runner.lowering_helpers import LoweringHelpers, LoweringTarget, LoweringTask
from jaxllm.runner.lowering_worker import lower
from jaxllm.runner.planning import draft_plan
from jaxllm.runner.program_jobs import ProgramJobs
from jaxllm.weights.convert import model_class
from jaxllm.weights.json_file import read_json_object

ROOT = Path(__file__).resolve().parents[2]
KERNEL = re.compile(r"custom_call @mosaic_gpu_v2")


def measure(path: Path, device_kind: str, num_helpers: int) -> dict[str, Any]:
    hf = read_json_object(path / "config.json")
    config = EngineConfig(model=str(path), load_format="dummy")
    shape = model_class(hf, path.name).config_from_hf(hf)
    dtype = "bfloat16"
    attention = AttentionTarget("gpu", "9.0", config.block_size, dtype, device_kind, dtype)
    target = LoweringTarget(attention, "sm_90", "cuda", jax_settings())
    model = model_def(shape, dtype, target.kernels)
    backend, reason = select_backend(AttentionSpec.all_of(shape), attention)
    head_dims = cache_head_dims(shape, backend)
    plan = draft_plan(config, model, dtype, "gpu", (backend.name, reason), head_dims)
    names = [job.name for job in ProgramJobs(plan, model, backend, target.kernels).jobs()]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        wanted = [(name, Path(directory) / str(i)) for i, name in enumerate(names)]
        paths = dict(wanted)
        helpers = LoweringHelpers(target, num_helpers)
        started = time.monotonic()
        for name in helpers.share(plan, wanted, seconds.__setitem__):
            answer = lower(LoweringTask(target, plan, name, str(paths[name])))
            if answer.error is not None:
                raise SystemExit(f"error: {name}: {answer.error}")
            seconds[name] = answer.seconds
        elapsed = time.monotonic() - started
        helpers.close()
        programs = {name: described(paths[name], seconds[name]) for name in names}
    return {"helpers": num_helpers, "elapsed_seconds": elapsed, "programs": programs}


def described(path: Path, seconds: float) -> dict[str, Any]:
    data = path.read_bytes()
    text = jax.export.deserialize(bytearray(data)).mlir_module()
    return {"seconds": seconds, "bytes": len(data), "kernels": len(KERNEL.findall(text))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, nargs="?", default=ROOT / "configs" / "models" / "llama-3.1-8b"
    )
    parser.add_argument("--helpers", type=int, default=0)
    parser.add_argument("--device", default="NVIDIA H200", help="whose tuned configs to use")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = measure(args.model, args.device, args.helpers)
    for name, found in figures["programs"].items():
        size, kernels = found["bytes"] / 1000, found["kernels"]
        print(f"{name:36} {found['seconds']:6.2f} s {size:6.0f} kB {kernels:3} kernels")
    total = sum(found["seconds"] for found in figures["programs"].values())
    count = len(figures["programs"])
    print(f"{count} programs: {total:.1f} s of work in {figures['elapsed_seconds']:.1f} s")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
