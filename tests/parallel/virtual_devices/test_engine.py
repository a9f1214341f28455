"""Engines whose heads are shared out, beside the papers of what their layers attend."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxllm.llm import LLM
from jaxllm.models.params import ModelDef, Params
from jaxllm.outputs import RequestOutput
from jaxllm.score import logprob_fn
from tests.conftest import tiny_hf_config, write_tiny_tokenizer
from tests.fakes.dense_model import Change, Seen
from tests.fakes.variant_requests import (
    BROUGHT,
    CHUNK,
    HEADS,
    OTHER_END,
    PROMPT,
    VALUES,
    asked,
    changes_of,
    check,
    logprobs,
)

BROUGHT_HERE = {"token_bias": BROUGHT["token_bias"]}
BY_NUMBER = """
import jax.numpy as jnp
from pallas_kernels.attention.variant import AttentionVariant

def fade(score, q_pos, kv_pos, head, params):
    return score - 0.1 * head.astype(jnp.float32) * (q_pos - kv_pos).astype(jnp.float32)

def stripes(q_pos, kv_pos, head, params):
    return (q_pos - kv_pos) % (head + 1) == 0

BY_NUMBER = AttentionVariant("by_number", score_mod=fade, mask_mod=stripes)
"""
# One of each kind of param that lies where its heads do; test_score.py has all variants.
NAMES = ("t5_bias", "head_windows", "sinks", "token_bias")
DEVICES = 4


def by_number(seen: Seen) -> Seen:
    ago = np.arange(len(seen.scores[0]))[:, None] - np.arange(len(seen.scores[0]))[None]
    head = np.arange(HEADS)[:, None, None]
    visible = seen.visible & (ago % (head + 1) == 0)
    return Seen(seen.scores - 0.1 * head * ago, visible, seen.sink)


class Served(NamedTuple):
    llm: LLM
    model: ModelDef  # whole
    params: Params

    @property
    def runner(self) -> Any:
        core: Any = self.llm._core
        return core.executor

    def changes(self, brought: dict[str, Any] | None) -> list[Change]:
        return [*changes_of(NAMES, brought), by_number]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("shared"))
    sizes = {"num_hidden_layers": len(NAMES) + 1, "num_key_value_heads": HEADS}
    (directory / "config.json").write_text(json.dumps(tiny_hf_config("llama") | sizes))
    (directory / "mine.py").write_text(BY_NUMBER)
    layers = [{"variant": name, "params": VALUES.get(name, {})} for name in NAMES]
    layers.append({"variant": f"{directory}/mine.py:BY_NUMBER"})
    (directory / "layers.json").write_text(json.dumps({"layers": layers}))
    common: dict[str, Any] = {
        "attention": str(directory / "layers.json"),
        "load_format": "dummy",
        "dtype": "float32",
    }
    whole = logprob_fn(str(directory), **common)
    with LLM(
        str(directory),
        tensor_parallel_size=DEVICES,
        max_num_seqs=2,
        max_num_batched_tokens=CHUNK,
        max_model_len=64,
        block_size=16,
        num_gpu_blocks_override=12,
        swap_space=0.001,
        **common,
    ) as llm:
        served = Served(llm, whole.model, whole.model.flatten(whole.params.weights))
        served.runner.warm_up()  # as on accelerators: it must leave no trace
        yield served


def ask(served: Served, prompt: list[int], brought: list[dict[str, Any] | None]) -> Any:
    params = [asked(each, prompt_logprobs=0) for each in brought]
    return served.llm.generate([prompt] * len(brought), params, use_tqdm=False)


def test_answers_are_the_papers_and_alone_the_same(served: Served) -> None:
    """In chunks, decoded, beside a request that brings something else; bit for bit."""
    both: list[RequestOutput] = ask(served, PROMPT, [None, BROUGHT_HERE])
    for output, brought in zip(both, (None, BROUGHT_HERE), strict=True):
        check(served.model, served.params, output, served.changes(brought))
        (alone,) = ask(served, PROMPT, [brought])
        assert logprobs(alone) == logprobs(output)
    (output,) = served.llm.generate([OTHER_END], [asked(None)], use_tqdm=False)
    assert output.num_cached_tokens > 0
    check(served.model, served.params, output, served.changes(None))


def test_every_device_has_its_part_alone(served: Served) -> None:
    runner = served.runner
    model = runner._programs.model
    for array, spec, cut in zip(runner._params, model.specs, model.cuts, strict=True):
        assert {shard.data.shape for shard in array.addressable_shards} == {spec.shape}
        assert len(array.sharding.device_set) == DEVICES
        assert (cut is None) == (array.shape == spec.shape)
    names = [name for name, cut in zip(model.names, model.cuts, strict=True) if cut is None]
    assert all("norm" in name for name in names), "nothing else is on every device whole"
    for pages in runner._kv:
        assert {shard.data.shape[2] for shard in pages.addressable_shards} == {HEADS // DEVICES}


def test_blocks_move_to_the_host_and_back(served: Served) -> None:
    runner = served.runner
    ask(served, PROMPT, [BROUGHT_HERE])
    before = [np.asarray(pages) for pages in runner._kv]
    numbered = np.abs(before[-1]).max(axis=(1, 2, 3)) > 0  # what a request has brought of tokens
    first, second = np.flatnonzero(numbered)[:2].tolist()
    copied, loaded = np.flatnonzero(~numbered)[-2:].tolist()
    runner.move_blocks([(first, 0), (second, 1)], [(first, copied)], [], {})
    (held,) = runner._host.get([0])
    contents = np.concatenate([pages[first].ravel() for pages in before])
    np.testing.assert_array_equal(np.sort(held), np.sort(contents), "all heads, as in a file")
    runner.move_blocks([], [], [(1, loaded)], {})
    for old, new in zip(before, runner._kv, strict=True):
        assert (old[first] != old[copied]).any() and (old[second] != old[loaded]).any()
        want = old.copy()
        want[copied], want[loaded] = old[first], old[second]
        np.testing.assert_array_equal(new, want)
