"""The admission gate, alone and in front of the engine."""

import asyncio

import httpx
import pytest

from jaxllm.errors import InvalidRequestError, QueueFullError
from jaxllm.sampling_params import SamplingParams
from server.app import create_app
from server.limits import MAX_SCORED, AdmissionGate, check_scored, num_prompt_tokens
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient


def test_refuses_beyond_what_runs_and_waits() -> None:
    gate = AdmissionGate(3, 100)
    with gate.admit(2), gate.admit(1):
        with pytest.raises(QueueFullError), gate.admit(1):
            pass
        assert gate.num_admitted == 3
    with gate.admit(3):
        pass
    assert gate.num_admitted == 0


def test_tokens_wait_too() -> None:
    gate = AdmissionGate(100, 1000)
    with gate.admit(1, 900):
        with gate.admit(1, 100):
            with pytest.raises(QueueFullError):
                gate.check()
            with pytest.raises(QueueFullError), gate.admit(1, 1):
                pass
        gate.check()
    assert gate.num_tokens == 0


def test_a_flood_keeps_only_itself_out_where_shares_are_fair() -> None:
    gate = AdmissionGate(8, 1000, fair=True)
    with gate.admit(8, 100, "flood"):
        with pytest.raises(QueueFullError):
            gate.check(1, 1, "flood")
        with pytest.raises(QueueFullError):
            gate.check(5, 1, "other")
        with gate.admit(4, 500, "other"):
            with pytest.raises(QueueFullError):
                gate.check(1, 1, "other")
            with pytest.raises(QueueFullError):
                gate.check(1, 334, "third")
            gate.check(2, 333, "third")
        gate.check(4, 1, "third")  # who has gone counts no more
    assert gate.num_admitted == gate.num_tokens == 0
    unfair = AdmissionGate(8, 1000)
    with unfair.admit(8, 100, "flood"), pytest.raises(QueueFullError):
        unfair.check(1, 1, "other")


def test_places_are_given_back_by_failures() -> None:
    gate = AdmissionGate(1, 0)
    with pytest.raises(ZeroDivisionError), gate.admit(1, 7):
        raise ZeroDivisionError
    assert gate.num_admitted == gate.num_tokens == 0


def test_a_lone_request_is_never_too_large() -> None:
    with AdmissionGate(2, 10).admit(128, 10**6):
        pass


@pytest.mark.parametrize(
    ("seconds_each", "expected"), [(0.001, 1.0), (0.5, 5.0), (100.0, 60.0), (0.0, 1.0)]
)
def test_when_to_come_back(seconds_each: float, expected: float) -> None:
    """A tenth of a hundred sequences must end; the answer is 1 to 60 seconds."""
    now = 0.0
    gate = AdmissionGate(100, 1000, clock=lambda: now, jitter=lambda: 1.0)
    for _ in range(20):
        with gate.admit(1):
            now += seconds_each
    now += seconds_each
    with gate.admit(100), pytest.raises(QueueFullError) as refused:
        gate.check()
    assert refused.value.retry_after_s == pytest.approx(expected)


def test_nobody_comes_back_with_the_others() -> None:
    gate = AdmissionGate(1000, 1000)
    with gate.admit(1):
        pass
    seconds: set[float | None] = set()
    with gate.admit(1000):
        for _ in range(50):
            with pytest.raises(QueueFullError) as refused:
                gate.check()
            seconds.add(refused.value.retry_after_s)
    assert all(second is not None and 1 <= second <= 60 for second in seconds)


def test_prompts_are_measured_without_encoding_them() -> None:
    assert num_prompt_tokens(["x" * 400, "é" * 200, [1, 2, 3], ""]) == 100 + 100 + 3


def test_scored_prompts_are_bounded() -> None:
    params = SamplingParams(prompt_logprobs=20, n=16)
    check_scored(MAX_SCORED // 21 // 16, params)
    with pytest.raises(InvalidRequestError, match="log-probabilities"):
        check_scored(MAX_SCORED // 21 // 16 + 1, params)
    check_scored(10**9, SamplingParams(logprobs=20))


def test_a_full_queue_is_429_until_a_stream_has_ended(engine: FakeClient) -> None:
    engine.step_seconds = 0.05
    settings = ServerSettings(served_model_names=("fake",), max_num_seqs=1, max_num_queued_reqs=0)
    app = create_app(engine, settings)
    body = {"model": "fake", "prompt": "Hi", "stream": True, "max_tokens": 5}

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            first = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.1)
            second = await http.post("/v1/completions", json=body)
            assert second.status_code == 429
            assert second.json()["error"]["code"] == "server_overloaded"
            assert second.json()["error"]["type"] == "rate_limit_error"
            assert second.headers["retry-after"] in ("1", "2")
            assert (await first).status_code == 200
            assert (await http.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(run())
    assert app.state.serving.gate.num_admitted == 0
