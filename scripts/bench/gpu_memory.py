"""Memory plan against the truth on a GPU: an engine with dummy weights runs its worst step.

Prints what was planned, what the allocator says after the start, and its peak after steps that fill
every row and the largest program while all requests ask for penalties, truncation, masks,
log-probabilities and those of their prompts. Ends with an error if a step fails, or if what was set
aside cannot be allocated in one piece afterwards.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_memory.py``.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import EnginePlan
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore
from jaxllm.messages import EngineCoreRequest, StepOutputs
from jaxllm.models.params import Params
from jaxllm.runner.memory import MemoryPlan, this_device
from jaxllm.runner.model_runner import ModelRunner, StepHandle
from jaxllm.runner.programs import Programs
from jaxllm.sampling_params import SamplingParams
from jaxllm.weights.loader import dummy_params
from jaxllm.worker.wiring import (
    compile_programs,
    configure_jax,
    draft_programs,
    open_model,
    size_programs,
)

FULL_STEPS = 4  # steps of the long prompt
SHORT = 16  # tokens of the others' prompts


class WatchedRunner(ModelRunner):
    """Remembers the steps it was given."""

    def __init__(self, plan: EnginePlan, params: Params, programs: Programs):
        super().__init__(plan, params, programs)
        self.steps: list[tuple[int, int, str, bool, bool]] = []

    def dispatch(self, plan: SchedulerOutput) -> StepHandle:
        handle = super().dispatch(plan)
        masked, scored = bool(handle.masked.masks), handle.prompt_logprobs is not None
        self.steps.append((plan.num_tokens, len(plan.rows), str(handle.mode), masked, scored))
        return handle


class UnforgivingCore(EngineCore):
    """A step that fails ends the script instead of being tried again."""

    def _recover(self, lost: list[SchedulerOutput], failure: Exception) -> StepOutputs:
        raise failure


def allocator() -> dict[str, int]:
    stats: dict[str, int] = jax.devices()[0].memory_stats() or {}
    names = ("bytes_limit", "bytes_in_use", "peak_bytes_in_use", "largest_alloc_size", "pool_bytes")
    return {name: stats[name] for name in names if name in stats}


def build(config: EngineConfig) -> tuple[WatchedRunner, Programs, MemoryPlan]:
    """As the engine does it, but without the rehearsal of its working memory, which would hide
    what steps really take."""
    configure_jax(config)
    opened, device = open_model(config), this_device()
    programs = draft_programs(config, opened, device)
    spec = dict(zip(opened.model.names, opened.model.specs, strict=True))
    memory = size_programs(config, programs, device)
    params = opened.model.flatten(dummy_params(spec, config.seed))
    compile_programs(programs, memory)
    return WatchedRunner(programs.plan, params, programs), programs, memory


def demanding(name: str, prompt_len: int, max_tokens: int, vocab_size: int) -> EngineCoreRequest:
    params = SamplingParams(
        temperature=0.9,
        top_k=1000,
        top_p=0.95,
        min_p=0.001,
        seed=len(name),
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={token: 1.0 for token in range(100)},
        min_tokens=max_tokens,
        stop_token_ids=[5],
        logprobs=20,
        prompt_logprobs=20,
    )
    prompt = tuple((7 * i + len(name)) % vocab_size for i in range(prompt_len))
    return EngineCoreRequest(name, prompt, params, max_tokens, (3,), ((4, 5), (6,)))


def run_worst(core: UnforgivingCore) -> None:
    plan = core.scheduler.plan
    vocab_size, rows = plan.model.vocab_size, plan.max_num_seqs
    room = min(plan.max_model_len - 1, plan.kv_tokens // 2)
    longest = min(FULL_STEPS * (plan.max_num_batched_tokens - rows + 1), room)
    for index in range(rows - 1):
        core.add_request(demanding(str(index), SHORT, 2 * FULL_STEPS, vocab_size))
    core.add_request(demanding("long", longest, 1, vocab_size))
    while core.has_work():
        outputs = core.step()
        for event in outputs.events if outputs else ():
            if event.error is not None:
                raise SystemExit(f"request {event.request_id} failed: {event.error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="configs/models/llama-3.1-8b")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-model-len", type=int)
    begin = time.perf_counter()
    config = EngineConfig(load_format="dummy", **vars(parser.parse_args()))
    runner, programs, memory = build(config)
    gc.collect()
    plan, started = programs.plan, allocator()
    counted = memory.weights + memory.rows + plan.num_blocks * memory.block
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "start_seconds": round(time.perf_counter() - begin, 2),
        "kv_tokens": plan.kv_tokens,
        "planned": {
            "weights": memory.weights,
            "row_buffers": memory.rows,
            "kv_cache": plan.num_blocks * memory.block,
            "worst_program": memory.working.worst.name,
            "temporaries": memory.working.worst.temporary_bytes,
            "outputs_of_two_steps": memory.working.output_bytes,
            "reserve": memory.device.reserve,
            "source": memory.working.source,
        },
        "after_start": started,
        "not_counted": started.get("bytes_in_use", counted) - counted,
    }
    print(json.dumps(found, indent=1), flush=True)
    run_worst(UnforgivingCore(Scheduler(plan), runner))
    after = allocator()
    found |= {
        # tokens, rows, sampler, with masks, with scores of prompts
        "largest_step": max(runner.steps),
        "steps": len(runner.steps),
        "after_worst_step": after,
        "working_set_seen": after.get("peak_bytes_in_use", 0) - started.get("bytes_in_use", 0),
        "working_set_planned": memory.working.total,
    }
    found["left_at_peak"] = after.get("bytes_limit", 0) - after.get("peak_bytes_in_use", 0)
    jnp.zeros((memory.working.total,), jnp.uint8).block_until_ready()
    found["in_one_piece"] = memory.working.total
    found["programs"] = [
        (program.name, program.temporary_bytes, program.output_bytes)
        for program in programs.working_memory().programs
    ]
    found["seconds"] = round(time.perf_counter() - begin, 2)
    print(json.dumps(found, indent=1), flush=True)
    if out := os.environ.get("OUT"):
        (Path(out) / "memory.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
