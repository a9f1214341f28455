import numpy as np

from jaxllm.core.logprobs import prompt_logprobs, token_logprobs
from jaxllm.core.request import Request
from jaxllm.simulation.fake_executor import empty_logprobs
from tests.fakes.plans import make_request


def numbered(n: int):
    arrays = empty_logprobs(n)
    arrays.token_logprobs[:] = -np.arange(n)
    return arrays


def test_top_is_cut_to_what_was_asked():
    entry = token_logprobs(numbered(3), 2, 11, 4)
    assert (entry.token_id, entry.logprob) == (11, -2.0)
    assert len(entry.top_ids) == len(entry.top_logprobs) == 4
    assert token_logprobs(numbered(3), 2, 11, 0).top_ids == ()


def prompt_request(prompt_len: int, sent: int = 0) -> Request:
    request = Request(make_request(prompt=prompt_len, prompt_logprobs=1), 0, 64)
    request.num_prompt_logprobs = sent
    return request


def test_a_chunk_scores_the_tokens_after_those_it_feeds():
    request = prompt_request(6)
    entries = prompt_logprobs(request, numbered(20), offset=10, start=0, num_tokens=3)
    assert [e.token_id for e in entries] == list(request.core_request.prompt_token_ids[1:4])
    assert [e.logprob for e in entries] == [-10, -11, -12]


def test_the_last_fed_prompt_token_scores_the_output_and_is_left_out():
    entries = prompt_logprobs(
        prompt_request(6, sent=3), numbered(9), offset=0, start=3, num_tokens=3
    )
    assert len(entries) == 2


def test_what_was_sent_is_not_sent_again():
    request = prompt_request(6, sent=3)
    entries = prompt_logprobs(request, numbered(9), offset=0, start=0, num_tokens=6)
    assert [e.logprob for e in entries] == [-3, -4]
    request.num_prompt_logprobs = 5
    assert prompt_logprobs(request, numbered(9), offset=0, start=0, num_tokens=6) == ()
