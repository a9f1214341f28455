"""Keys and values found in the cache give the answer that computing them gives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention.kv_cache import bytes_per_block, kv_cache_spec
from jaxllm.config.model import AttentionChoice
from jaxllm.messages import EngineCoreRequest
from jaxllm.runner.block_moves import (
    abstract_blocks,
    abstract_ids,
    copy_blocks,
    load_blocks,
    save_blocks,
)
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.answers import Answers
from tests.fakes.tiny_engine import TINY, Answer, TinyEngine

TEXT = tuple(int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, 100))
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, seed=0, max_tokens=12, ignore_eos=True),
    "drawn": SamplingParams(seed=5, max_tokens=12, ignore_eos=True, logprobs=2),
    "penalties": SamplingParams(
        temperature=0.0,
        seed=0,
        max_tokens=12,
        ignore_eos=True,
        repetition_penalty=1.9,
        frequency_penalty=0.7,
    ),
    "prompt_logprobs": SamplingParams(temperature=0.0, seed=0, max_tokens=4, prompt_logprobs=1),
}


def request(name: str, prompt: tuple[int, ...], params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(name, prompt, params, params.max_tokens or 0)


def requests_of(params: SamplingParams) -> list[EngineCoreRequest]:
    """The same text, its continuation, one that parts from it inside a block, and its beginning."""
    return [
        request("first", TEXT[:50], params),
        request("same", TEXT[:50], params),
        request("longer", TEXT[:90], params),
        request("parts", (*TEXT[:42], 1, 2, 3), params),
        request("shorter", TEXT[:33], params),
    ]


def equal(answer: Answer, expected: Answer) -> None:
    assert answer.token_ids == expected.token_ids
    assert answer.finish_reason == expected.finish_reason
    for name in ("logprobs", "prompt_logprobs"):
        found, wanted = ([x.logprob for x in getattr(a, name)] for a in (answer, expected))
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("join", [0, 1, 9])
def test_answers_are_those_without_the_cache(engine: TinyEngine, kind: str, join: int) -> None:
    requests = requests_of(PARAMS[kind])
    expected = {r.request_id: engine.run([r])[r.request_id] for r in requests}
    core = engine.core()
    answers = engine.run(requests, core, join=join)
    for name, answer in answers.items():
        equal(answer, expected[name])
    hits = core.scheduler.kv_cache.num_hit_tokens
    assert (hits == 0) == (kind == "prompt_logprobs")


def test_a_preempted_request_goes_on_where_it_was(engine: TinyEngine) -> None:
    requests = [request(f"r{i}", TEXT[i : i + 40], PARAMS["penalties"]) for i in range(3)]
    expected = {r.request_id: engine.run([r])[r.request_id] for r in requests}
    core = engine.core()
    for one in requests:
        core.add_request(one)
    answers = Answers()
    for one in requests:
        answers.expect(one.request_id)
    for step in range(200):
        if step == 8:
            core.scheduler.preempt_all()
        answers.take(core.step() if core.has_work() else None)
    for name, answer in answers.by_id.items():
        assert answer.token_ids == expected[name].token_ids
    assert core.scheduler.num_preemptions > 0


@pytest.mark.parametrize("offloading", [False, True])
def test_blocks_come_back_from_the_host(engine: TinyEngine, offloading: bool) -> None:
    """A pool that holds two of the requests: the others' blocks have to make way."""
    params = SamplingParams(
        temperature=0.0, seed=0, max_tokens=60, ignore_eos=True, repetition_penalty=1.9
    )
    texts = [TEXT[10 * i : 10 * i + 40] for i in range(3)]
    requests = [request(f"r{i}", text, params) for i, text in enumerate(texts)]
    again = [request(f"again{i}", text, params) for i, text in enumerate(texts)]
    expected = {r.request_id: engine.run([r])[r.request_id].token_ids for r in requests + again}
    core = engine.core(num_blocks=9, offloading=offloading)
    for batch in (requests, again):
        for name, answer in engine.run(batch, core).items():
            assert answer.token_ids == expected[name]
    assert core.scheduler.kv_cache.num_loaded_blocks > 0


def test_copying_blocks_needs_no_second_cache() -> None:
    kv = kv_cache_spec(TINY, 4097, 16, "float32")
    memory = (
        jax.jit(copy_blocks, donate_argnums=0)
        .lower(kv, abstract_ids(2))
        .compile()
        .memory_analysis()
    )
    cache_bytes = sum(layer.size * 4 for layer in kv)
    assert memory is not None
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_numbers_of_tokens_leave_and_come_back_with_their_block(dtype: str) -> None:
    """One block is one array of the pages' dtype, whatever its layers keep."""
    model = replace(TINY, attention=(AttentionChoice("causal"), AttentionChoice("token_bias")))
    specs = kv_cache_spec(model, 3, 16, dtype)
    assert [spec.shape for spec in specs[2:]] == [(3, 1, TINY.num_kv_heads, 16)]
    assert sum(spec.size // 3 * spec.dtype.itemsize for spec in specs) == bytes_per_block(
        model, 16, dtype
    )
    rng = np.random.default_rng(0)
    kv = tuple(jnp.asarray(rng.integers(0, 9, spec.shape), spec.dtype) for spec in specs)
    kv = (*kv[:2], kv[2] + 0.1)
    blocks = save_blocks(kv, jnp.array([2, 0]))
    assert {block.shape for block in blocks} == {abstract_blocks(kv)[0].shape}
    back = load_blocks(kv, jnp.array([0, 2]), blocks)
    for old, new in zip(kv, back, strict=True):
        np.testing.assert_array_equal(old[jnp.array([2, 1, 0])], new)
