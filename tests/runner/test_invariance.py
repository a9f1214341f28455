"""A request's answer does not depend on its company, its chunks, its schedule or preemptions."""

import numpy as np
import pytest

from jaxllm.messages import EngineCoreRequest
from tests.fakes.ascii_tokenizer import EOS, regex
from tests.fakes.tiny_engine import Answer, TinyEngine, request

RNG = np.random.default_rng(11)


def prompt(length: int) -> list[int]:
    return RNG.integers(0, 96, length).tolist()


def mixed_requests(count: int) -> list[EngineCoreRequest]:
    """Mixed lengths and parameters: every branch of the sampler meets every other in one batch."""
    variants: list[dict[str, object]] = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 6, "top_k": 5},
        {"temperature": 1.3, "seed": 7, "top_p": 0.8, "min_p": 0.02},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"temperature": 0.9, "seed": 8, "repetition_penalty": 1.7},
        {"logit_bias": {3: 20.0, 4: -20.0}, "logprobs": 4},
        {"allowed_token_ids": [1, 2, 3, 50, 95], "temperature": 1.0, "seed": 9},
        {"bad_words_token_ids": ((7,), (3, 4), (50, 1, 2)), "allowed_token_ids": [1, 2, 3, 4, 50]},
        {"min_tokens": 6, "stop_token_ids": list(range(0, 96, 3)), "temperature": 1.0, "seed": 1},
        {"prompt_logprobs": 2, "logprobs": 0},
        {"grammar": regex("[a-f]{2,30}(xy)?z"), "eos_token_ids": (EOS,), "temperature": 1.0},
        {
            "grammar": regex("(no|yes,? ?)+"),
            "eos_token_ids": (EOS,),
            "logprobs": 2,
            "seed": 3,
            "temperature": 1.5,
            "presence_penalty": 1.0,
            "bad_words_token_ids": ((ord("n") - 32,),),
        },
    ]
    out: list[EngineCoreRequest] = []
    for index in range(count):
        params = dict(variants[index % len(variants)])
        length, tokens = int(RNG.integers(1, 90)), int(RNG.integers(1, 24))
        params["min_tokens"] = min(int(str(params.get("min_tokens", 0))), tokens)
        out.append(request(f"r{index}", prompt(length), tokens, **params))
    return out


def alone(engine: TinyEngine, requests: list[EngineCoreRequest]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for item in requests:
        answers |= engine.run([item])
    return answers


def assert_same(got: dict[str, Answer], want: dict[str, Answer]) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].token_ids == expected.token_ids, name
        assert got[name].finish_reason == expected.finish_reason in ("stop", "length")
        assert got[name].stop_reason == expected.stop_reason
        for part in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(got[name], part), getattr(expected, part)
            assert [p.token_id for p in ours] == [p.token_id for p in theirs], (name, part)
            np.testing.assert_allclose(
                [p.logprob for p in ours], [p.logprob for p in theirs], atol=1e-4
            )


@pytest.fixture(scope="module")
def requests() -> list[EngineCoreRequest]:
    return mixed_requests(32)


@pytest.fixture(scope="module")
def solo(engine: TinyEngine, requests: list[EngineCoreRequest]) -> dict[str, Answer]:
    return alone(engine, requests)


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["ahead", "in step"])
def test_together_with_preemption_equals_alone(
    engine: TinyEngine,
    requests: list[EngineCoreRequest],
    solo: dict[str, Answer],
    async_scheduling: bool,
) -> None:
    core = engine.core(async_scheduling=async_scheduling, num_blocks=14)
    assert_same(engine.run(requests, core), solo)
    assert core.stats().num_preemptions > 0
    assert core.stats().kv_cache_usage == 0.0


def test_joining_and_leaving_equals_alone(
    engine: TinyEngine, requests: list[EngineCoreRequest], solo: dict[str, Answer]
) -> None:
    assert_same(engine.run(requests, join=3), solo)


@pytest.mark.parametrize("budget", [8, 13, 32])
def test_chunked_prefill_equals_whole(
    engine: TinyEngine,
    requests: list[EngineCoreRequest],
    solo: dict[str, Answer],
    budget: int,
) -> None:
    core = engine.core(max_num_batched_tokens=budget)
    assert_same(engine.run(requests, core), solo)


def test_every_variant_did_something(solo: dict[str, Answer]) -> None:
    """Guards the tests above: a sampler that ignores its parameters would pass them all."""
    assert len({tuple(a.token_ids[:1]) for a in solo.values()}) > 5
    assert set(solo["r7"].token_ids) <= {1, 2, 3, 50, 95}
    assert {3} == set(solo["r6"].token_ids)
    joined = " ".join(map(str, solo["r8"].token_ids))
    assert " 3 4" not in joined and "50 1 2" not in joined
    assert {a.finish_reason for a in solo.values()} == {"stop", "length"}
