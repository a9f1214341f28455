"""config.json: what is nonsense is a ConfigError that names the key, never a wrong model."""

from typing import Any

import pytest

from jaxllm.config.model import ExpertsConfig, LatentConfig, ModelConfig, RopeConfig
from jaxllm.errors import ConfigError
from jaxllm.models import MODELS, get_model
from jaxllm.models.hf_config import MAX_LAYERS, HFConfig

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def without(settings: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}


def rope(**changes: Any) -> RopeConfig:
    return HFConfig(BASE | changes).rope(8)


@pytest.mark.parametrize("architecture", MODELS.names())
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "64", True, [64], {}, 2**31])
def test_a_size_must_be_a_positive_integer(architecture: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        get_model(architecture).config_from_hf(BASE | LATENT | {key: value})


NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("num_hidden_layers", {"num_hidden_layers": MAX_LAYERS + 1}),
    ("head_dim", {"head_dim": 7}),
    ("head_dim", {"head_dim": 1}),
    ("head_dim", {"num_attention_heads": 64, "num_key_value_heads": 64}),
    ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
    ("rms_norm_eps", {"rms_norm_eps": 0}),
    ("rope_theta", {"rope_theta": float("inf")}),
    ("rope_theta", {"rope_theta": "1e4"}),
    ("hidden_act", {"hidden_act": "relu"}),
    ("hidden_act", {"hidden_act": ["silu"]}),
    ("dtype", {"dtype": 16}),
    ("tie_word_embeddings", {"tie_word_embeddings": "yes"}),
    ("attention_bias", {"attention_bias": 1}),
    ("eos_token_id", {"eos_token_id": True}),
    ("eos_token_id", {"eos_token_id": [1, "2"]}),
    ("eos_token_id", {"eos_token_id": -1}),
    ("bos_token_id", {"bos_token_id": 2**31}),
    ("partial_rotary_factor", {"partial_rotary_factor": "half"}),
    ("head_dim", {"partial_rotary_factor": 2.0}),
    ("head_dim", {"partial_rotary_factor": 0.4}),
    ("rope_scaling", {"rope_scaling": "yarn"}),
    ("original_max", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("rope_type", {"rope_scaling": {"rope_type": ["linear"]}}),
    ("factor", {"rope_scaling": {"type": "linear"}}),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("below high_freq_factor", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}),
    *(
        (key, {"rope_scaling": without(LLAMA3, key)})
        for key in LLAMA3
        if key not in ("rope_type", "rope_theta")
    ),
]


@pytest.mark.parametrize(("named", "changes"), NONSENSE, ids=str)
def test_nonsense_is_refused_by_name(named: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=named):
        get_model("LlamaForCausalLM").config_from_hf(BASE | changes)


@pytest.mark.parametrize(
    "types", ["sliding_attention", ["sliding_attention"], ["chunked_attention"] * 3, [[], [], []]]
)
def test_layer_types_that_nobody_knows(types: object) -> None:
    config = BASE | {"sliding_window": 8, "layer_types": types}
    with pytest.raises(ConfigError, match="layer_types"):
        get_model("MistralForCausalLM").config_from_hf(config)


def windows(architecture: str, **changes: Any) -> tuple[int | None, ...]:
    return get_model(architecture).config_from_hf(BASE | changes).sliding_windows


def test_windows_of_every_layer() -> None:
    assert windows("LlamaForCausalLM", sliding_window=8) == ()
    assert windows("MistralForCausalLM", sliding_window=None) == ()
    assert windows("MistralForCausalLM", sliding_window=8) == (8, 8, 8)
    qwen = {"use_sliding_window": True, "sliding_window": 8}
    assert windows("Qwen2ForCausalLM", sliding_window=8) == ()
    assert windows("Qwen2ForCausalLM", **qwen) == (None, None, None)  # 28 layers are full
    assert windows("Qwen2ForCausalLM", **qwen, max_window_layers=0) == (8, 8, 8)
    partly = {"max_window_layers": 2, "layer_types": None}
    assert windows("Qwen3ForCausalLM", **qwen, **partly) == (None, None, 8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows("Qwen2ForCausalLM", **qwen, layer_types=types) == (8, None, 8)


def test_both_spellings_of_rope_settings() -> None:
    older = {"rope_theta": 5e5, "rope_scaling": without(LLAMA3, "rope_theta")}
    assert rope(**older) == rope(rope_parameters=LLAMA3)
    assert rope(**older).original_max_position == 64
    linear = {"type": "linear", "factor": 2, "rope_theta": None}
    assert rope(rope_theta=100.0, rope_scaling=linear) == RopeConfig(
        100.0, 8, scaling="linear", factor=2.0
    )
    assert rope() == rope(rope_scaling=None) == RopeConfig(10000.0, 8)
    assert rope(rope_parameters={"partial_rotary_factor": 0.5}).dim == 4


def test_glm_rotates_half_of_each_head_unless_told() -> None:
    model = get_model("GlmForCausalLM")
    assert model.config_from_hf(BASE).rope == RopeConfig(10000.0, 4, interleaved=True)
    whole: dict[str, Any] = BASE | {"partial_rotary_factor": 1.0}
    assert model.config_from_hf(whole).rope.dim == 8


def test_layers_without_rotation() -> None:
    model = get_model("SmolLM3ForCausalLM")
    every: dict[str, Any] = {"num_hidden_layers": 5}
    assert model.config_from_hf(BASE | every).attention_layers == (
        *["rotary"] * 3,
        "nope",
        "rotary",
    )
    named: dict[str, Any] = {"no_rope_layers": [1, 0, 1], "sliding_window": 8}
    assert model.config_from_hf(BASE | named).attention_layers == ("rotary", "nope", "rotary")
    assert windows("SmolLM3ForCausalLM", **named) == ()
    assert windows("SmolLM3ForCausalLM", **named, use_sliding_window=True) == (None, 8, None)
    for wrong in ([1, 0], [1, 0, 2], [1, 0, []], 1):
        with pytest.raises(ConfigError, match="no_rope_layers"):
            windows("SmolLM3ForCausalLM", no_rope_layers=wrong)


def deepseek(version: int, **changes: Any) -> ModelConfig:
    model = get_model(f"DeepseekV{version}ForCausalLM")
    return model.config_from_hf(BASE | LATENT | changes)


EXPERTS: dict[str, Any] = {
    "n_routed_experts": 16,
    "first_k_dense_replace": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}


def test_latent_attention() -> None:
    config = deepseek(3)
    assert config.latent == LatentConfig(None, 16, 8, 4, 8)
    assert config.rope == RopeConfig(10000.0, 4, interleaved=True)
    assert config.experts is None
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        get_model("DeepseekV3ForCausalLM").config_from_hf(BASE)


def test_layers_of_experts() -> None:
    assert deepseek(3, **EXPERTS | {"first_k_dense_replace": 3}).experts is None
    assert deepseek(2, **EXPERTS, n_group=4, topk_group=2, n_shared_experts=2).experts == (
        ExpertsConfig(2, 16, 3, 24, 48, 1.0)
    )
    limited = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    assert deepseek(2, **EXPERTS, **limited, routed_scaling_factor=16).experts == (
        ExpertsConfig(2, 16, 3, 24, 0, 16.0, groups=4, groups_chosen=2)
    )
    assert deepseek(3, **EXPERTS).experts == (
        ExpertsConfig(2, 16, 3, 24, 0, 2.5, "sigmoid", True, groups=8, groups_chosen=4)
    )
    for version, wrong, message in (
        (2, {"topk_method": "noaux_tc"}, "topk_method"),
        (2, {"scoring_func": "sigmoid"}, "scoring_func"),
        (2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (2, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (2, {"num_experts_per_tok": 17}, "num_experts_per_tok"),
        (3, {"n_group": 3}, "n_group"),
        (3, {"n_group": 16}, "n_group"),
        (3, {"topk_group": 9}, "topk_group"),
        (3, {"mlp_bias": True}, "mlp_bias"),
    ):
        with pytest.raises(ConfigError, match=message):
            deepseek(version, **EXPERTS | wrong)


def test_yarn() -> None:
    yarn: dict[str, Any] = {
        "type": "yarn",
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    }
    config = deepseek(2, rope_scaling=yarn)
    assert config.rope.scaling == "yarn"
    assert (config.rope.factor, config.rope.amplitude) == (40.0, 1.0)
    assert config.latent is not None
    assert config.latent.score_factor == pytest.approx(1.2608**2, rel=1e-4)
    assert rope(rope_scaling=without(yarn, "mscale")).amplitude == pytest.approx(1.36889, rel=1e-5)
    assert rope(rope_scaling=yarn | {"attention_factor": 1.5}).amplitude == 1.5
    for wrong, message in (({"truncate": False}, "truncate"), ({"rope_theta": 1}, "rope_theta")):
        with pytest.raises(ConfigError, match=message):
            rope(rope_scaling=yarn | wrong)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (2, (2,)), ([], ()), ([5, 2], (5, 2))])
def test_end_of_sequence_ids(value: object, ids: tuple[int, ...]) -> None:
    assert HFConfig({"eos_token_id": value}).token_ids("eos_token_id") == ids
