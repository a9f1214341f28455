import math
from typing import Any

import msgspec
import pytest

from jaxllm.config.model import RowParam
from jaxllm.engine.request_validator import validate_request
from jaxllm.errors import ContextLengthExceededError, InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from tests.fakes.plans import make_request

VOCAB = 100


def check(request: EngineCoreRequest) -> None:
    validate_request(request, VOCAB, 32)


@pytest.mark.parametrize(
    "request_",
    [
        make_request(prompt=(0, VOCAB - 1)),
        make_request(prompt=24, max_tokens=8),
        make_request(prompt=32, max_tokens=0),
        make_request(
            eos=(2,),
            stop_token_ids=(99,),
            allowed_token_ids=(0, 99),
            logit_bias={99: 1.0},
            min_tokens=2,
        ),
    ],
)
def test_good_requests_pass(request_: EngineCoreRequest):
    check(request_)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request(prompt=()), "prompt"),
        (make_request(priority=2**63), "priority"),
        (make_request(prompt=(1, -1)), "prompt"),
        (make_request(prompt=(1, VOCAB)), "prompt"),
        (make_request(prompt=(2**31,)), "prompt"),
        (make_request(prompt=(2**70,)), "prompt"),
        (make_request(prompt=(1.5,)), "prompt"),  # type: ignore[arg-type]
        (make_request(prompt=(math.nan,)), "prompt"),  # type: ignore[arg-type]
        (make_request(prompt=("a",)), "prompt"),  # type: ignore[arg-type]
        (make_request(prompt=((1, 2), (3, 4))), "prompt"),  # type: ignore[arg-type]
        (make_request(prompt=((1, 2), (3,))), "prompt"),  # type: ignore[arg-type]
        (make_request(n=2), "n"),
        (make_request(seed=None), "seed"),
        (make_request(eos=(VOCAB,)), "eos_token_ids"),
        (make_request(stop_token_ids=(VOCAB,)), "stop_token_ids"),
        (make_request(allowed_token_ids=(0, VOCAB)), "allowed_token_ids"),
        (make_request(logit_bias={VOCAB: 1.0}), "logit_bias"),
        (msgspec.structs.replace(make_request(), bad_words_token_ids=((1, VOCAB),)), "bad_words"),
        (msgspec.structs.replace(make_request(), bad_words_token_ids=((),)), "bad_words"),
        (msgspec.structs.replace(make_request(), max_tokens=-1), "max_tokens"),
    ],
)
def test_bad_requests_name_the_field(request_: EngineCoreRequest, param: str):
    with pytest.raises(InvalidRequestError) as error:
        check(request_)
    assert error.value.param == param


@pytest.mark.parametrize(("prompt", "max_tokens"), [(25, 8), (32, 1), (33, 0)])
def test_too_long(prompt: int, max_tokens: int):
    with pytest.raises(ContextLengthExceededError, match="32"):
        check(make_request(prompt=prompt, max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("brought", "words"),
    [
        ({"bias": 2, "span": [0, 5]}, None),
        ({"slope": 1.0}, "it takes: bias, span"),
        ({"bias": [1.0]}, "one number"),
        ({"span": 3}, "a list of 2 numbers"),
        ({"span": [1, 2, 3]}, "a list of 2 numbers"),
        ({"span": [0.5, 2]}, "whole numbers"),
    ],
)
def test_what_requests_bring_for_attention_is_checked(brought: Any, words: str | None) -> None:
    known = (RowParam("bias", None, False), RowParam("span", 2, True))
    request = make_request(attention_params=brought)
    if words is None:
        validate_request(request, VOCAB, 32, attention_params=known)
        return
    with pytest.raises(InvalidRequestError, match=words) as caught:
        validate_request(request, VOCAB, 32, attention_params=known)
    assert caught.value.param == "attention_params"
    assert caught.value.status == 400


@pytest.mark.parametrize(("prompt", "span"), [(20, 9), (5, 6), (5, -1)])
def test_a_span_must_fit_into_a_step_and_into_the_prompt(prompt: int, span: float) -> None:
    known = (RowParam("prefix_len", None, True, longest=8),)
    request = make_request(prompt=prompt, attention_params={"prefix_len": span})
    with pytest.raises(InvalidRequestError, match="attention_params"):
        validate_request(request, VOCAB, 32, attention_params=known)
    for good in (0, 5):
        request = make_request(prompt=5, attention_params={"prefix_len": good})
        validate_request(request, VOCAB, 32, attention_params=known)
