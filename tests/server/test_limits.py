"""The admission gate, alone and in front of the engine."""

import asyncio

import httpx
import pytest

from jaxllm.errors import QueueFullError
from server.app import create_app
from server.limits import AdmissionGate
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient


def test_refuses_beyond_what_runs_and_waits() -> None:
    gate = AdmissionGate(max_running=2, max_queued=1)
    with gate.admit(2), gate.admit(1):
        with pytest.raises(QueueFullError), gate.admit(1):
            pass
        assert gate.num_admitted == 3
    with gate.admit(3):
        pass
    assert gate.num_admitted == 0


def test_places_are_given_back_by_failures() -> None:
    gate = AdmissionGate(1, 0)
    with pytest.raises(ZeroDivisionError), gate.admit(1):
        raise ZeroDivisionError
    assert gate.num_admitted == 0


def test_a_lone_request_is_never_too_large() -> None:
    with AdmissionGate(2, 0).admit(128):
        pass


def test_no_limit() -> None:
    with AdmissionGate(0, None).admit(10**6) as nothing:
        assert nothing is None


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
            assert second.headers["retry-after"] == "1"
            assert (await first).status_code == 200
            assert (await http.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(run())
    assert app.state.serving.gate.num_admitted == 0
