"""Attention variants in the engine: chosen by name or file, per layer, with what requests bring."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from jaxllm.attention.variants import choose_attention, find_variant, register_variant
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.llm import LLM
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.runner.compile_counter import compile_counter
from jaxllm.runner.lowering_cache import is_ours
from jaxllm.sampling_params import SamplingParams
from pallas_kernels.attention.variant import AttentionVariant, VariantError
from tests.conftest import tiny_hf_config
from tests.fakes.dense_model import Change, Seen, logprobs

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


def by_hand(llm: LLM, change: Change) -> list[int]:
    """Greedy tokens of whole sequences, every layer's attention changed so."""
    core: Any = llm._core
    runner: Any = core.executor
    model, tokens = runner._programs.model, list(PROMPT)
    changes = [change] * MODEL.num_layers
    for _ in range(NEW):
        said = logprobs(model, runner._params, tokens, changes=changes)
        tokens.append(int(said[-1].argmax()))
    return tokens[len(PROMPT) :]


def test_a_users_file_is_served_with_what_requests_bring(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    with started(tiny_model_dir, attention=f"{tmp_path / 'mine.py'}:MINE") as llm:

        def bias(even: float, weights: Sequence[float] = ()) -> Change:
            def added(seen: Seen) -> Seen:
                at = np.arange(seen.scores.shape[-1])
                keys = np.array([*weights, *[0.25] * (len(at) - len(weights))])
                near = np.where((at[:, None] - at) % 2 == 0, even, 0.0)
                return seen._replace(scores=seen.scores + near + keys)

            return added

        weights = [9.0 * (index % 3) for index in range(33)]
        known, plain = compile_counter(), greedy(llm)
        before = known()
        answers = [plain, *(greedy(llm, **given) for given in ({"weight": weights}, {"even": 9.0}))]
        assert known() == before, "what serves one request serves whatever is brought"
        assert len({tuple(answer) for answer in answers}) == 3
        few = weights[:28]  # the last five have the default
        for brought in (weights, None, few, weights[::-1], weights):  # of the same tokens
            given = {} if brought is None else {"weight": brought}
            assert greedy(llm, **given) == by_hand(llm, bias(0.0, brought or ()))
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


def test_what_hides_more_by_pages_than_it_says_is_not_served(tmp_path: Path) -> None:
    file = tmp_path / "narrow.py"
    file.write_text(
        "from pallas_kernels.attention.variant import AttentionVariant\n"
        "import jax.numpy as jnp\n"
        "def near(q, k, head, params): return (k <= q) & (q - k < 90)\n"
        "def span(first, last, params): return jnp.maximum(first - 30, 0), last + 1\n"
        "NARROW = AttentionVariant('narrow', mask_mod=near, kv_range=span)\n"
    )
    with pytest.raises(ConfigError, match="hides key 0 from queries 31 to 31"):
        choose_attention(str(file), None, MODEL)


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
        ('{"layers": [{"variant": "alibi", "param": {}}]}', None, "has 'param'; known: layer, pa"),
        ('{"layers": ["alibi"], "params": {}}', None, "has 'params'; known: layers"),
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


def test_what_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="register_variant"):
        choose_attention(cast(Any, AttentionVariant("mine")), None, MODEL)
    with pytest.raises(ConfigError, match="a file of layers: name one of its variants"):
        find_variant(str(tmp_path / "mix.json"))


def test_a_file_finds_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("SLOPE = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "from beside_it import SLOPE\n"
        "from pallas_kernels.attention.variant import AttentionVariant\n"
        "MINE = AttentionVariant('mine', lambda s, q, k, h, p: s - SLOPE)\n"
    )
    before = list(sys.path)
    assert find_variant(str(tmp_path / "mine.py")).name == "mine"
    assert sys.path == before


def test_registering_traces_the_functions() -> None:
    wrong = AttentionVariant("wrong", mask_mod=lambda q, k, h, p: q - k)
    with pytest.raises(VariantError, match="mask_mod must give a bool"):
        register_variant(wrong)
    with pytest.raises(VariantError, match="built-in"):
        register_variant(wrong, "alibi")
