"""Attention variants in the engine: chosen by name or file, per layer, with what requests bring."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention.variants import choose_attention, find_variant, register_variant
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.layers.nope import NoPEAttention
from jaxllm.llm import LLM
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.runner.compile_counter import compile_counter
from jaxllm.runner.lowering_cache import is_ours
from jaxllm.sampling_params import SamplingParams
from pallas_kernels.attention.variant import AttentionVariant, VariantError
from tests.conftest import tiny_hf_config

PROMPT, NEW = list(range(40, 73)), 8  # two chunks of 16 and one token
MODEL = LlamaForCausalLM.config_from_hf(tiny_hf_config("llama"))
MINE = """
import jax.numpy as jnp
from pallas_kernels.attention.variant import AttentionVariant, Param

def parity(score, q_pos, kv_pos, head, params):
    score = jnp.where((q_pos - kv_pos) % 2 == 0, score + params.even, score)
    return score + (params.weight.key - 0.5 * params.weight.query)

PARAMS = (Param("even", "per_row"), Param("weight", "per_token", default=0.25))
MINE = AttentionVariant("mine", score_mod=parity, params=PARAMS)
"""


def started(directory: Path, **settings: Any) -> LLM:
    common: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "max_num_seqs": 2}
    common |= {"max_num_batched_tokens": 16, "max_model_len": 64, "block_size": 16}
    return LLM(str(directory), num_gpu_blocks_override=12, **common, **settings)


def greedy(llm: LLM, **brought: Any) -> list[int]:
    params = SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, attention_params=brought or None
    )
    return list(llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids)


def by_hand(llm: LLM, bias: Any) -> list[int]:
    """Greedy tokens of a forward over the whole sequence, with ``bias(layer)`` [H, N, N] added to
    the scores of causal attention."""
    core: Any = llm._core
    runner: Any = core.executor
    model = runner._programs.model.merge(runner._params)
    step = jax.jit(lambda tokens: _logits(model, tokens, bias))
    tokens = np.array([*PROMPT, *[0] * NEW], np.int32)  # what follows is not seen
    for end in range(len(PROMPT), len(tokens)):
        tokens[end] = int(np.argmax(step(tokens)[end - 1]))
    return tokens[len(PROMPT) :].tolist()


def _logits(model: Any, tokens: jax.Array, bias: Any) -> jax.Array:
    x, count = model.embed(tokens), tokens.shape[0]
    position = jnp.arange(count, dtype=jnp.float32)[:, None]
    for index, layer in enumerate(model.layers):
        part, spec = layer.attention, layer.attention.spec
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = part.qkv(layer.input_norm(x)).reshape(count, -1, dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
        if not isinstance(part, NoPEAttention):
            q, k = (_rotated(part_, position, MODEL.rope.theta) for part_ in (q, k))
        k, v = (jnp.repeat(part_, heads // kv_heads, axis=1) for part_ in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q, k) * spec.scale + bias(index, heads, count)
        scores = jnp.where(jnp.tril(jnp.ones((count, count), bool))[None], scores, -jnp.inf)
        out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
        x = x + part.o(out.reshape(count, -1))
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.compute_logits(model.norm(x))


def _rotated(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    angle = position * theta ** (-jnp.arange(half, dtype=jnp.float32)[None] / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def distance(count: int) -> jax.Array:
    index = jnp.arange(count)
    return index[:, None] - index[None]


def test_a_variant_is_served_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Prefilled in chunks of 16, then decoded; of two layers one has it, one no positions and what
    looks ahead."""
    file = tmp_path / "mix.json"
    steep = [4.0] * MODEL.num_heads
    alibi = {"variant": "alibi", "params": {"slopes": steep}}
    ahead = {"layer": "nope", "variant": "prefix_lm"}
    file.write_text(json.dumps({"layers": [alibi, ahead]}))
    with started(tiny_model_dir, attention=str(file)) as llm:

        def bias(layer: int, heads: int, count: int) -> jax.Array:
            slope = -4.0 if layer % 2 == 0 else 0.0
            return slope * distance(count).astype(jnp.float32)[None]

        got = greedy(llm)
        assert got == by_hand(llm, bias)
        assert got != by_hand(llm, lambda layer, heads, count: jnp.zeros((heads, 1, 1)))
        assert len(greedy(llm, prefix_len=15)) == NEW
        with pytest.raises(InvalidRequestError, match="from 0 to 15: the prompt has 33 tokens"):
            greedy(llm, prefix_len=16)


def test_a_users_file_is_served_with_what_requests_bring(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    with started(tiny_model_dir, attention=f"{tmp_path / 'mine.py'}:MINE") as llm:

        def bias(even: float, weights: list[float] | None = None) -> Any:
            def added(layer: int, heads: int, count: int) -> jax.Array:
                known = jnp.asarray(weights or [], jnp.float32)
                keys = jnp.full(count, 0.25).at[: len(known)].set(known)
                return jnp.where(distance(count) % 2 == 0, even, 0.0)[None] + keys[None, None]

            return added

        weights = [9.0 * (index % 3) for index in range(33)]
        known = compile_counter()
        before = known()
        answers = [greedy(llm, **given) for given in ({}, {"weight": weights}, {"even": 9.0})]
        assert known() == before, "what the start compiled serves whatever is brought"
        assert len({tuple(answer) for answer in answers}) == 3
        few = weights[:28]  # the last five have the default
        for brought in (weights, None, few, weights[::-1], weights):  # of the same tokens
            given = {} if brought is None else {"weight": brought}
            assert greedy(llm, **given) == by_hand(llm, bias(0.0, brought))
        assert greedy(llm, weight=weights) != greedy(llm)

        for even in (0.0, 9.0):
            assert greedy(llm, even=even) == by_hand(llm, bias(even))
        assert greedy(llm) == by_hand(llm, bias(0.0)), "the row's next owner brings nothing"
        assert greedy(llm, even=9.0) != greedy(llm)
        for brought, message in (
            ({"odd": 1.0}, "takes: even, weight"),
            ({"even": [1.0]}, "one number"),
            ({"weight": 1.0}, "a number for each"),
            ({"weight": [1.0] * 34}, "of which there are 33"),
            ({"even": float("nan")}, "attention_params.even"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                greedy(llm, **brought)
        variant = find_variant(llm.config.attention or "")
        assert not is_ours(variant.score_mod), "its lowered form must not be kept"  # pyright: ignore


def test_layers_repeat_and_values_are_checked(tmp_path: Path) -> None:
    mix, values = tmp_path / "mix.json", tmp_path / "values.json"
    mix.write_text(json.dumps({"layers": ["sliding_window", "causal"]}))
    values.write_text(json.dumps({"window": 16}))
    chosen = choose_attention(str(mix), str(values), MODEL)
    assert [choice.variant for choice in chosen[:2]] == ["sliding_window", "causal"]
    assert chosen[0].values == (("window", 16),)
    assert choose_attention(None, None, MODEL) == ()


@pytest.mark.parametrize(
    ("attention", "values", "message"),
    [
        ("nothing", None, "no attention variant 'nothing'; known: causal"),
        ("missing.py:A", None, "no file missing.py"),
        ('{"layers": [{"layer": "no"}]}', None, "no attention layer 'no'; known: rotary"),
        ('{"layers": [{"layer": 3}]}', None, "A layer is a name or"),
        ('{"layers": [{"params": {}}]}', None, "A layer is a name or"),
        ("prefix_lm", {"prefix_len": 4}, "each request says"),
        ("alibi", {"slopes": [1.0]}, "takes shape"),
        ("alibi", {"slope": 1.0}, "no variant of this model takes 'slope'"),
        (None, {"slopes": 1.0}, "needs --attention"),
    ],
)
def test_wrong_choices_are_refused(
    attention: str | None, values: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))
    if attention is not None and attention.startswith("{"):
        (tmp_path / "layers.json").write_text(attention)
        attention = str(tmp_path / "layers.json")
    with pytest.raises(ConfigError, match=message):
        choose_attention(attention, str(file) if values is not None else None, MODEL)


def test_registering_traces_the_functions() -> None:
    wrong = AttentionVariant("wrong", mask_mod=lambda q, k, h, p: q - k)
    with pytest.raises(VariantError, match="mask_mod must give a bool"):
        register_variant(wrong)
    with pytest.raises(VariantError, match="built-in"):
        register_variant(wrong, "alibi")
