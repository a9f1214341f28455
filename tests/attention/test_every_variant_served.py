"""Every registered variant in one running engine, a layer each, beside its paper in float64."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxllm.errors import InvalidRequestError
from jaxllm.llm import LLM
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from pallas_kernels.attention.variants import VARIANTS
from pallas_kernels.attention.variants.alibi import slopes
from tests.conftest import tiny_hf_config, write_tiny_tokenizer
from tests.fakes import dense_model, dense_variants

NAMES = tuple(VARIANTS)
HEADS, CHUNK, NEW = 4, 16, 12
PROMPT = np.random.default_rng(5).integers(0, 256, 45).tolist()
OTHER_END = [*PROMPT[:20], *PROMPT[:25]]
NUMBERS = np.random.default_rng(6)
VALUES: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 9},
    "softcap": {"cap": 0.02},
    "sinks": {"sink": [-1.0, 0.5, 2.0, 3.0]},
    "t5_bias": {"bias": NUMBERS.normal(size=(HEADS, 129)).tolist()},
    "dilated": {"stride": 3},
    "block_global": {"block": 8, "num_global": 3},
    "head_windows": {"windows": [2, 5, 16, 40]},
}
BROUGHT: dict[str, Any] = {
    "prefix_len": CHUNK - 1,
    "starts": [20, 33, *[2**31 - 1] * 6],
    "bias": 1.5,
    "span": [7, 30],
    "token_bias": NUMBERS.normal(size=40).tolist(),
    "decay": NUMBERS.normal(size=len(PROMPT)).tolist(),
}
NOTHING: dict[str, Any] = {
    "prefix_len": 0,
    "starts": [],
    "bias": 0.0,
    "span": [0, 0],
    "token_bias": [],
    "decay": [],
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("variants"))
    config = tiny_hf_config("llama") | {"num_hidden_layers": len(NAMES)}
    (directory / "config.json").write_text(json.dumps(config))
    layers = [{"variant": name, "params": VALUES.get(name, {})} for name in NAMES]
    (directory / "layers.json").write_text(json.dumps({"layers": layers}))
    with LLM(
        str(directory),
        attention=str(directory / "layers.json"),
        load_format="dummy",
        dtype="float32",
        max_num_seqs=2,
        max_num_batched_tokens=CHUNK,
        max_model_len=64,
        num_gpu_blocks_override=12,
    ) as llm:
        yield llm


def asked(brought: dict[str, Any] | None, **more: Any) -> SamplingParams:
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
    return SamplingParams(**common, logprobs=0, attention_params=brought, **more)


def by_paper(
    llm: LLM, tokens: list[int], brought: dict[str, Any] | None, names: tuple[str, ...] = NAMES
) -> np.ndarray:
    """[T, V] of what follows each token."""
    core: Any = llm._core
    runner: Any = core.executor
    values = {"slopes": slopes(HEADS)} | NOTHING | (brought or {})
    changes = [dense_variants.change(n, values | VALUES.get(n, {})) for n in names]
    return dense_model.logprobs(runner._programs.model, runner._params, tokens, changes=changes)


def check(llm: LLM, output: RequestOutput, brought: dict[str, Any] | None) -> None:
    answer = output.outputs[0]
    made, tokens = list(answer.token_ids), [*output.prompt_token_ids, *answer.token_ids]
    wanted = by_paper(llm, tokens, brought)
    assert len(made) == NEW
    assert wanted[-NEW - 1 : -1].argmax(axis=1).tolist() == made
    scored = [*(output.prompt_logprobs or [])[1:], *(answer.logprobs or [])]
    said = tokens[-len(scored) :]
    got = [entry[t].logprob for entry, t in zip(scored, said, strict=True) if entry is not None]
    picked = wanted[np.arange(-len(said) - 1, -1), said]
    np.testing.assert_allclose(got, picked, atol=1e-5)


def test_every_variant_has_a_reference() -> None:
    assert set(dense_variants.VARIANTS) == set(VARIANTS)


def test_answers_are_the_papers(llm: LLM) -> None:
    """In chunks, decoded, beside a request that brings something else, and from the cache."""
    for prompt, hits, options in ((PROMPT, False, {"prompt_logprobs": 0}), (OTHER_END, True, {})):
        params = [asked(brought, **options) for brought in (None, BROUGHT)]
        outputs = llm.generate([prompt] * 2, params, use_tqdm=False)
        for output, brought in zip(outputs, (None, BROUGHT), strict=True):
            assert (output.num_cached_tokens > 0) == hits
            check(llm, output, brought)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "causal"])
def test_what_is_compared_depends_on_every_variant(llm: LLM, name: str) -> None:
    without = tuple("causal" if each == name else each for each in NAMES)
    both = [by_paper(llm, PROMPT, BROUGHT, names) for names in (NAMES, without)]
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_span_that_no_step_holds_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="from 0 to 15: the prompt has 45 tokens"):
        llm.generate([PROMPT], asked({"prefix_len": CHUNK}), use_tqdm=False)
