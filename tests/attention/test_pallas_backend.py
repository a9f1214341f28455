"""What a CPU can see of the Pallas backend: its refusals, and that whole steps lower for Hopper."""

from dataclasses import replace
from functools import partial

import jax
import pytest

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.backends.pallas import BACKEND
from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.models.params import model_def
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import forward

SPEC = AttentionSpec(32, 8, 128, 0.1)
H200 = AttentionTarget("gpu", "9.0", 64, "bfloat16")
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=256,
    hidden_size=256,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope=RopeConfig(theta=10000.0, dim=64),
    norm_eps=1e-6,
    max_position_embeddings=8192,
    sliding_windows=(None, 512, None),
)


@pytest.mark.parametrize(
    ("spec", "target", "reason"),
    [
        (SPEC, replace(H200, platform="cpu", compute_capability=""), "Hopper"),
        (SPEC, replace(H200, compute_capability="8.0"), "Hopper"),
        (replace(SPEC, head_dim=80), H200, "head dims"),
        (SPEC, replace(H200, page_size=8), "page sizes"),
        (SPEC, replace(H200, dtype="float32"), "float32"),
    ],
)
def test_refuses_with_a_reason(spec: AttentionSpec, target: AttentionTarget, reason: str) -> None:
    assert reason in str(BACKEND.refuses(spec, target))


def test_refuses_a_jax_that_its_kernels_do_not_lower_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 9))
    assert BACKEND.refuses(SPEC, H200) is None
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert "JAX 0.11" in str(BACKEND.refuses(SPEC, H200))


def test_whole_steps_lower_for_hopper_with_each_kernel_once() -> None:
    """Three layers of two kinds: a kernel appears once per kind of layer, not once per layer."""
    buckets = make_buckets((8,), (64,), 8)
    plan = EnginePlan(MODEL, "bfloat16", 8192, 8, 64, 64, 300, buckets, "pallas", "test")
    programs = Programs(plan, model_def(MODEL, "bfloat16"), BACKEND)
    for bucket, per_kind in zip(buckets, (2, 3), strict=True):  # decode, combine; prefill
        function = partial(forward, program=programs.step_program(bucket))
        jitted = jax.jit(function, donate_argnums=(1, 2))
        traced = jitted.trace(*programs._forward_args(bucket))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        kernels = text.count("@mosaic_gpu_v2")
        assert 0 < kernels <= 2 * per_kind
