"""Keys and values in eight bits: found, moved or computed again, they give the same answers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.model import LatentConfig
from jaxllm.config.plan import make_buckets
from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.answers import Answers
from tests.fakes.tiny_engine import TINY, TinyEngine, tiny_plan

TEXT = tuple(int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, 100))
PARAMS = SamplingParams(
    temperature=0.0, seed=0, max_tokens=60, ignore_eos=True, repetition_penalty=1.9
)


@pytest.fixture(scope="module")
def fp8_engine() -> TinyEngine:
    """One of its two layers keeps keys alone."""
    buckets = make_buckets((8,), (64,), 8)
    latent = LatentConfig(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=10)
    model = replace(TINY, attention_layers=("rotary", "latent"), latent=latent)
    return TinyEngine(tiny_plan(model=model, kv_cache_dtype="fp8", buckets=buckets))


def requests_named(name: str, count: int = 3) -> list[EngineCoreRequest]:
    texts = [TEXT[10 * i : 10 * i + 40] for i in range(count)]
    return [EngineCoreRequest(f"{name}{i}", text, PARAMS, 60) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def alone(fp8_engine: TinyEngine) -> list[list[int]]:
    """The answer of each request by itself, nothing cached."""
    return [
        list(fp8_engine.run([one])[one.request_id].token_ids) for one in requests_named("alone")
    ]


def test_pages_take_a_byte_per_number(fp8_engine: TinyEngine) -> None:
    pages = fp8_engine.runner()._kv
    assert pages is not None
    assert {page.dtype for page in pages} == {jnp.dtype(jnp.uint8)}
    assert [page.shape[1:] for page in pages] == [(2, 2, 16, 8), (1, 1, 16, 24)]


@pytest.mark.parametrize(
    ("num_blocks", "offloading"), [(65, False), (9, False), (9, True)], ids=["all", "two", "saved"]
)
def test_blocks_found_and_blocks_from_the_host_give_the_same_answers(
    fp8_engine: TinyEngine, alone: list[list[int]], num_blocks: int, offloading: bool
) -> None:
    """Nine blocks have room for two of the three."""
    core = fp8_engine.core(num_blocks=num_blocks, offloading=offloading)
    for name in ("first", "again"):
        answers = fp8_engine.run(requests_named(name), core)
        assert [list(answers[f"{name}{i}"].token_ids) for i in range(3)] == alone
    cache = core.scheduler.kv_cache
    assert (cache.num_loaded_blocks if num_blocks == 9 else cache.num_hit_tokens) > 0


def test_a_preempted_request_goes_on_where_it_was(
    fp8_engine: TinyEngine, alone: list[list[int]]
) -> None:
    core, answers = fp8_engine.core(), Answers()
    for one in requests_named("r"):
        core.add_request(one)
        answers.expect(one.request_id)
    for step in range(200):
        if step == 8:
            core.scheduler.preempt_all()
        answers.take(core.step() if core.has_work() else None)
    assert [list(answers.by_id[f"r{i}"].token_ids) for i in range(3)] == alone
    assert core.scheduler.num_preemptions > 0
