"""What a CPU can see of the Pallas backend: its refusals, and that whole steps lower for Hopper."""

import re
from dataclasses import replace
from functools import partial

import jax
import pytest

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.backends.pallas import BACKEND, _say_once
from jaxllm.attention.select import cache_head_dims
from jaxllm.config.model import AttentionChoice, LatentConfig, ModelConfig, RopeConfig
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.models.params import model_def
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import forward
from pallas_kernels.attention.variants.alibi import ALIBI
from pallas_kernels.attention.variants.forgetting import FORGETTING

SPEC = AttentionSpec(32, 8, 128, 0.1)
LATENT = AttentionSpec(16, 1, 576, 0.1, value_dim=512)  # DeepSeek-V2-Lite's
H200 = AttentionTarget("gpu", "9.0", 64, "bfloat16")
FP8_PAGES = replace(H200, page_dtype="float8_e4m3fn")
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
QWEN3 = replace(MODEL, architecture="Qwen3ForCausalLM", qk_norm=True)
GLM = replace(
    MODEL,
    architecture="GlmForCausalLM",
    qkv_bias=True,
    rope=RopeConfig(theta=10000.0, dim=32, interleaved=True),
)


@pytest.mark.parametrize(
    ("spec", "target", "reason"),
    [
        (SPEC, replace(H200, platform="cpu", compute_capability=""), "Hopper"),
        (SPEC, replace(H200, compute_capability="8.0"), "Hopper"),
        (SPEC, replace(H200, page_dtype="int4"), "int4"),
        (replace(SPEC, head_dim=256), replace(H200, page_dtype="float8_e4m3fn"), "bytes"),
        (replace(SPEC, head_dim=100), H200, "head dims"),
        (replace(LATENT, head_dim=288, value_dim=256), H200, "256 in 288"),
        (replace(LATENT, num_heads=20), H200, "multiple of 8 query heads"),
        (replace(LATENT, window=64), H200, "no window"),
        (replace(LATENT, variant=ALIBI), H200, "no variant"),
        (LATENT, FP8_PAGES, "no latents of eight bits"),
        (SPEC, replace(H200, page_size=8), "page sizes"),
        (replace(SPEC, variant=FORGETTING), replace(H200, page_size=16), "from 32 on"),
        (replace(SPEC, variant=FORGETTING), FP8_PAGES, "eight bits"),
        (SPEC, replace(H200, dtype="float32"), "float32"),
    ],
)
def test_refuses_with_a_reason(spec: AttentionSpec, target: AttentionTarget, reason: str) -> None:
    assert reason in str(BACKEND.refuses(spec, target))


@pytest.mark.parametrize("spec", [SPEC, LATENT, replace(LATENT, num_heads=128)], ids=str)
def test_takes_what_there_is_a_kernel_for(spec: AttentionSpec) -> None:
    assert BACKEND.refuses(spec, H200) is None


PLAIN = replace(MODEL, sliding_windows=())
DANUBE = replace(PLAIN, head_dim=80, rope=RopeConfig(theta=10000.0, dim=80))
WIDE = replace(PLAIN, head_dim=256, rope=RopeConfig(theta=10000.0, dim=256))


@pytest.mark.parametrize(
    ("model", "writes"),
    [(MODEL, 1), (QWEN3, 1), (GLM, 0), (DANUBE, 1), (WIDE, 1)],
    ids=["llama", "qwen3", "glm", "heads of 80", "heads of 256"],
)
def test_whole_steps_lower_for_hopper_with_each_kernel_once(
    model: ModelConfig, writes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Three layers of two kinds: a kernel appears once per kind of layer, not once per layer, and
    nothing but the kernels and the layers around them ever takes a cache.
    """
    _say_once.cache_clear()
    buckets = make_buckets((8,), (64,), 8)
    stored = BACKEND.cache_head_dim(model.head_dim)
    facts = ("bfloat16", 8192, 8, 64, 64, 300, buckets, "pallas", "test")
    plan = EnginePlan(model, *facts, cache_head_dims=(stored,) * model.num_layers)
    programs = Programs(plan, model_def(model, "bfloat16"), BACKEND)
    for bucket, per_kind in zip(buckets, (2, 3), strict=True):  # decode, combine; prefill
        function = partial(forward, program=programs.step_program(bucket))
        jitted = jax.jit(function, donate_argnums=(1, 2))
        traced = jitted.trace(*programs._forward_args(bucket))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("func.func private @rope_and_write_sm90") == writes
        assert 0 < text.count("@mosaic_gpu_v2") <= 2 * per_kind + writes
        takers = "func.func|return|call|stablehlo.custom_call @mosaic_gpu_v2"
        if not writes:
            takers += r"|stablehlo.scatter|\}\)"  # the scatter's types stand at its end
        assert f"tensor<300x2x2x64x{stored}xbf16>" in text
        for line in text.splitlines():
            if f"tensor<300x2x2x64x{stored}xbf16>" in line:
                assert re.match(rf"\s*(%\S+ = )?({takers})", line.replace('"', "")), line[:200]
    said = [record.message for record in caplog.records if "Plain XLA writes" in record.message]
    assert len(said) == 1 - writes


@pytest.mark.parametrize(
    ("model", "layers", "own", "wide"),
    [
        (MODEL, ("rotary", "nope", "differential", "forgetting"), 64, 128),
        (DANUBE, ("rotary", "differential"), 128, 256),
    ],
    ids=["heads of 64", "of 80"],
)
def test_layers_of_other_shapes_lower_beside_each_other(
    model: ModelConfig, layers: tuple[str, ...], own: int, wide: int
) -> None:
    """Differential layers have half the KV heads, twice as wide; unrotated ones are no other kind
    for the kernel that writes. Each is padded by itself: heads of 80 to 128, of 160 to 256. What
    one keeps of tokens, and what another's mask hides, are operands of its kernels alone."""
    count = len(layers)
    variants = (AttentionChoice("block_global"), *[AttentionChoice("causal")] * (count - 1))
    model = replace(
        model, num_layers=count, attention_layers=layers, attention=variants, sliding_windows=()
    )
    text = _lowered_mixed_step(model)
    assert text.count("func.func private @rope_and_write_sm90") == 1
    for heads, dim in ((2, own), (1, wide)):
        assert f"tensor<300x2x{heads}x64x{dim}xbf16>" in text
    calls = _kernel_calls(text)
    kept = sum("tensor<300x1x2x64xf32>" in line for line in calls)
    assert kept == (2 if "forgetting" in layers else 0)  # decode, prefill


def _lowered_mixed_step(model: ModelConfig) -> str:
    bucket = make_buckets((8,), (64,), 8)[1]
    facts = ("bfloat16", 8192, 8, 64, 64, 300, (bucket,), "pallas", "test")
    plan = EnginePlan(model, *facts, cache_head_dims=cache_head_dims(model, BACKEND))
    programs = Programs(plan, model_def(model, "bfloat16"), BACKEND)
    function = partial(forward, program=programs.step_program(bucket))
    traced = jax.jit(function, donate_argnums=(1, 2)).trace(*programs._forward_args(bucket))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _kernel_calls(text: str) -> list[str]:
    return [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]


def test_layers_over_latents_lower_with_each_kernel_once() -> None:
    """Decode, its combine, prefill; beside them only what writes takes a cache."""
    model = replace(
        PLAIN,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        attention_layers=("latent", "latent"),
        latent=LatentConfig(q_rank=None, kv_rank=128, nope_dim=64, rope_dim=64, value_dim=64),
    )
    text = _lowered_mixed_step(model)
    assert len(_kernel_calls(text)) == 3
    takers = r"func.func|return|call|stablehlo.(custom_call @mosaic_gpu_v2|scatter)|\}\)"
    for line in text.splitlines():
        if "tensor<300x1x1x64x192xbf16>" in line:
            assert re.match(rf"\s*(%\S+ = )?({takers})", line.replace('"', "")), line[:200]
