"""The decoder's residual stream: on Hopper nothing but the norms' kernel adds to it."""

from dataclasses import replace
from functools import partial

import jax
import pytest

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.models.params import model_def
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import forward

LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=256,
    hidden_size=256,
    intermediate_size=384,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    rope=RopeConfig(theta=10000.0, dim=64),
    norm_eps=1e-6,
    max_position_embeddings=256,
)


@pytest.mark.parametrize("sandwich", [False, True], ids=["llama", "sandwich"])
@pytest.mark.parametrize("platform", ["sm_90", "cuda"])
def test_every_residual_add_is_part_of_a_norm(platform: str, sandwich: bool) -> None:
    config = replace(LLAMA, sandwich_norms=sandwich)
    buckets = make_buckets((4,), (16,), 4)
    plan = EnginePlan(config, "bfloat16", 256, 4, 16, 16, 20, buckets, "xla", "test")
    programs = Programs(plan, model_def(config, "bfloat16", platform), BACKEND)
    step = jax.jit(partial(forward, program=programs.step_program(buckets[0])))
    lowered = step.trace(*programs._forward_args(buckets[0])).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    adds = [line for line in text.splitlines() if "stablehlo.add" in line and "4x256xbf16" in line]
    kernels = text.count("func.func private @add_rms_norm_sm90")
    # Each layer adds two branches but the first, which has none before it; the final norm, which
    # needs no sum, the last. Layers but the first share one function, all their norms one kernel.
    assert (len(adds), kernels) == ((0, 2) if platform == "sm_90" else (1 + 2 + 1, 0))
