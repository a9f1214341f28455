import pytest

from jaxllm.core.request import Request
from jaxllm.core.stop import check_stop
from tests.fakes.plans import EOS, make_request


def stopped(output: list[int], max_tokens: int = 4, max_model_len: int = 64, **params):
    request = Request(
        make_request(prompt=5, max_tokens=max_tokens, eos=(EOS,), **params), 0, max_model_len
    )
    may_end = [request.append(token) for token in output]
    end = check_stop(request)
    if output and end is not None:
        assert may_end[-1], "append() did not announce that this may be the end"
    return end


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ([9], {}, None),
        ([9, EOS], {}, ("stop", None)),
        ([EOS], {"ignore_eos": True}, None),
        ([7], {"stop_token_ids": (7, 8)}, ("stop", 7)),
        ([EOS], {"stop_token_ids": (EOS,)}, ("stop", None)),
        ([EOS], {"stop_token_ids": (EOS,), "ignore_eos": True}, ("stop", EOS)),
        ([1, 2, 4, 5], {}, ("length", None)),
        ([1, 2, 4, EOS], {}, ("stop", None)),
        ([EOS], {"min_tokens": 2}, None),
        ([1, EOS], {"min_tokens": 2}, ("stop", None)),
        ([7], {"min_tokens": 2, "stop_token_ids": (7,)}, None),
        ([1, 2], {"max_model_len": 7}, ("length", None)),
        ([1, 2], {"max_model_len": 7, "min_tokens": 4}, ("length", None)),
        ([], {"max_tokens": 0}, ("length", None)),
        ([], {}, None),
    ],
)
def test_stop(output: list[int], params: dict, expected: tuple[str, int | None] | None):
    assert stopped(output, **params) == expected
