"""Every registered variant in one running engine, a layer each, beside its paper in float64."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxllm.errors import InvalidRequestError
from jaxllm.llm import LLM
from jaxllm.models.params import ModelDef, Params
from pallas_kernels.attention.variants import VARIANTS
from tests.conftest import tiny_hf_config, write_tiny_tokenizer
from tests.fakes import dense_model, dense_variants
from tests.fakes.variant_requests import (
    BROUGHT,
    CHUNK,
    OTHER_END,
    PROMPT,
    VALUES,
    asked,
    changes_of,
    check,
)

NAMES = tuple(VARIANTS)


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


def served(llm: LLM) -> tuple[ModelDef, Params]:
    core: Any = llm._core
    runner: Any = core.executor
    return runner._programs.model, runner._params


def test_every_variant_has_a_reference() -> None:
    assert set(dense_variants.VARIANTS) == set(VARIANTS)


def test_answers_are_the_papers(llm: LLM) -> None:
    """In chunks, decoded, beside a request that brings something else, and from the cache."""
    for prompt, hits, options in ((PROMPT, False, {"prompt_logprobs": 0}), (OTHER_END, True, {})):
        params = [asked(brought, **options) for brought in (None, BROUGHT)]
        outputs = llm.generate([prompt] * 2, params, use_tqdm=False)
        for output, brought in zip(outputs, (None, BROUGHT), strict=True):
            assert (output.num_cached_tokens > 0) == hits
            check(*served(llm), output, changes_of(NAMES, brought))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "causal"])
def test_what_is_compared_depends_on_every_variant(llm: LLM, name: str) -> None:
    without = tuple("causal" if each == name else each for each in NAMES)
    both = [
        dense_model.logprobs(*served(llm), PROMPT, changes=changes_of(names, BROUGHT))
        for names in (NAMES, without)
    ]
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_span_that_no_step_holds_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="from 0 to 15: the prompt has 45 tokens"):
        llm.generate([PROMPT], asked({"prefix_len": CHUNK}), use_tqdm=False)
