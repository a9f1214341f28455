"""Programs of several Hopper GPUs, lowered without one."""

from dataclasses import replace

import jax

from jaxllm.attention.backend import AttentionTarget
from jaxllm.attention.select import BACKENDS
from jaxllm.config.model import AttentionChoice
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.params import model_def
from jaxllm.parallel.mesh import DeviceMesh
from jaxllm.runner.program_jobs import ProgramJobs
from tests.conftest import tiny_hf_config

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def test_kernels_are_those_of_half_the_heads() -> None:
    """For two GPUs, kernels and all: each knows of its part alone."""
    config = LlamaForCausalLM.config_from_hf(tiny_hf_config("llama") | SIZES)
    config = replace(config, num_layers=1, attention=(AttentionChoice("alibi"),)).part(2)
    target = AttentionTarget("gpu", "9.0", 64, "bfloat16", "NVIDIA H200")
    backend, buckets = BACKENDS.load("pallas").on(target), make_buckets((4,), (), 4)
    plan = EnginePlan(config, "bfloat16", 256, 4, 4, 64, 20, buckets, "pallas", "test")
    model, devices = model_def(config, "bfloat16", "sm_90"), DeviceMesh(2)
    job = ProgramJobs(plan, model, backend, "sm_90").jobs()[0]
    step = jax.jit(devices.spread(job.function, job.given, job.made))
    args = devices.whole(job.args, job.given)
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "num_partitions = 2" in text
    kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line]
    pages = [line for line in kernels if "x64x64xbf16" in line]
    assert len(pages) == 2, "one writes keys and values, one attends"
    assert all("tensor<20x2x2x64x64xbf16>" in line for line in pages)
