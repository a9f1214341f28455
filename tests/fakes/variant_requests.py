"""Requests to a model with variants for layers, and what it must answer by their papers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.models.params import ModelDef, Params
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from pallas_kernels.attention.variants.alibi import slopes
from tests.fakes import dense_model, dense_variants

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


def asked(brought: dict[str, Any] | None, **more: Any) -> SamplingParams:
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
    return SamplingParams(**common, logprobs=0, attention_params=brought, **more)


def changes_of(names: Sequence[str], brought: dict[str, Any] | None) -> list[dense_model.Change]:
    values = {"slopes": slopes(HEADS)} | NOTHING | (brought or {})
    return [dense_variants.change(n, values | VALUES.get(n, {})) for n in names]


def check(
    model: ModelDef, params: Params, output: RequestOutput, changes: list[dense_model.Change]
) -> None:
    """``params``: of one device."""
    answer = output.outputs[0]
    made, tokens = list(answer.token_ids), [*output.prompt_token_ids, *answer.token_ids]
    wanted = dense_model.logprobs(model, params, tokens, changes=changes)
    assert len(made) == NEW
    assert wanted[-NEW - 1 : -1].argmax(axis=1).tolist() == made
    got = logprobs(output)
    said = tokens[-len(got) :]
    picked = wanted[np.arange(-len(said) - 1, -1), said]
    np.testing.assert_allclose(got, picked, atol=1e-5)


def logprobs(output: RequestOutput) -> list[float]:
    """Of the tokens of the answer, and of the prompt's that have one."""
    answer = output.outputs[0]
    scored = [*(output.prompt_logprobs or [])[1:], *(answer.logprobs or [])]
    said = [*output.prompt_token_ids, *answer.token_ids][-len(scored) :]
    return [entry[t].logprob for entry, t in zip(scored, said, strict=True) if entry is not None]
