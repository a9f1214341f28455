"""Shapes that divide nothing: the same answers whole, in chunks, alone, together and resumed."""

from dataclasses import replace
from typing import Any

import pytest

from jaxllm.config.plan import make_buckets
from tests.fakes.tiny_engine import TINY, TinyEngine, request, tiny_plan

# A budget smaller than most prompts, blocks larger than a window and too few of them for two, three
# heads, a vocabulary smaller than the number of alternatives, half precision.
MODEL = replace(TINY, vocab_size=13, num_heads=3, num_kv_heads=1, sliding_windows=(3, None))
SHAPE: dict[str, Any] = {
    "max_model_len": 101,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 7,
    "block_size": 4,
    "num_blocks": 30,
    "dtype": "float16",
}


@pytest.fixture(scope="module")
def odd_engine() -> TinyEngine:
    buckets = make_buckets((2,), (7,), 2)
    return TinyEngine(tiny_plan(model=MODEL, buckets=buckets, **SHAPE))


def prompt(length: int) -> list[int]:
    return [7 * i % MODEL.vocab_size for i in range(length)]


@pytest.mark.parametrize("length", [1, 2, 36, 37, 38, 81])
def test_decoding_equals_prefilling(odd_engine: TinyEngine, length: int) -> None:
    tokens = prompt(length)
    item = request("whole", tokens, 20, logprobs=20, prompt_logprobs=20)
    whole = odd_engine.run([item])["whole"]
    assert len(whole.token_ids) == 20
    assert [scored.token_id for scored in whole.prompt_logprobs] == tokens[1:]
    for scored in (*whole.logprobs, *whole.prompt_logprobs):
        assert len(set(scored.top_ids)) == len(scored.top_ids) == MODEL.vocab_size
    for count in (1, 6, 19):
        one = odd_engine.run([request("one", tokens + whole.token_ids[:count], 1)])["one"]
        assert one.token_ids == whole.token_ids[count : count + 1]


def test_everything_at_once_equals_alone(odd_engine: TinyEngine) -> None:
    allowed = list(range(0, MODEL.vocab_size, 2))
    requests = [
        request(
            f"r{i}",
            prompt(1 + 14 * i),
            25,
            temperature=1.0,
            seed=-i - 1,
            allowed_token_ids=allowed,
            bad_words_token_ids=((2,), (4, 6), (6, 6, 0)),
            repetition_penalty=1.2,
            presence_penalty=0.3,
            min_tokens=i,
            stop_token_ids=[8],
            prompt_logprobs=1,
        )
        for i in range(6)
    ]
    core = odd_engine.core()
    together = odd_engine.run(requests, core)
    assert core.stats().num_preemptions > 0
    for item in requests:
        alone, got = odd_engine.run([item])[item.request_id], together[item.request_id]
        assert got.token_ids == alone.token_ids and set(got.token_ids) <= set(allowed) - {2}
        assert [p.token_id for p in got.prompt_logprobs] == list(item.prompt_token_ids[1:])
        assert got.finish_reason == alone.finish_reason in ("stop", "length")
