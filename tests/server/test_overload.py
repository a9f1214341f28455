"""More requests than the server takes: the others are told at once, those it took are served."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient
from tests.server.test_live import wait_until
from tests.server.wire import Answer, connect, read_answer, request, running

pytestmark = pytest.mark.alone

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "fake", "prompt": "Hi", "max_tokens": 20, "ignore_eos": True}
ROOM: dict[str, Any] = {"max_num_seqs": 2, "max_num_queued_reqs": 6}
JSON = {"content-type": "application/json"}


@contextmanager
def served(engine: FakeClient, **settings: Any) -> Iterator[tuple[int, Any]]:
    app = create_app(engine, ServerSettings(served_model_names=("fake",), **(ROOM | settings)))
    with running(app) as port:
        yield port, app.state.serving.gate


def check_refusal(answer: Answer) -> None:
    assert answer.status == 429
    assert (answer.error["type"], answer.error["code"]) == ("rate_limit_error", "server_overloaded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 1000 <= int(answer.headers["retry-after-ms"]) <= 60_000
    assert "x-should-retry" not in answer.headers


@contextmanager
def full(port: int, gate: Any, count: int = 8) -> Iterator[list[Any]]:
    """As many streams as there is room for; yields what will be their answers."""
    url = f"http://127.0.0.1:{port}{COMPLETIONS}"
    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(httpx.post, url, json=BODY, timeout=60) for _ in range(count)]
        wait_until(lambda: gate.num_admitted == count)
        yield answers


def test_refusals_are_quick_and_complete(engine: FakeClient) -> None:
    engine.step_seconds = 0.15
    data = request(COMPLETIONS, "Content-Type: application/json", method="POST",
                   body=json.dumps(BODY).encode())  # fmt: skip

    def seconds(port: int) -> list[float]:
        found: list[float] = []
        with connect(port) as connection:  # which goes on after each refusal
            for _ in range(100):
                started = time.perf_counter()
                connection.sendall(data)
                check_refusal(read_answer(connection))
                found.append(time.perf_counter() - started)
        return found

    with served(engine) as (port, gate), full(port, gate) as answers:
        rounds = [sorted(seconds(port)) for _ in range(3)]
        assert gate.num_admitted == 8
    assert min(taken[98] for taken in rounds) <= 0.25
    assert all(answer.result().status_code == 200 for answer in answers)
    assert len(engine.prompts) == 8
    assert gate.num_admitted == gate.num_tokens == 0


def test_a_refused_request_is_not_even_read(engine: FakeClient) -> None:
    engine.step_seconds = 0.03
    head = ("Content-Type: application/json", "Content-Length: 1000000")
    with served(engine) as (port, gate), full(port, gate), connect(port) as connection:
        connection.sendall(request(COMPLETIONS, *head, method="POST"))
        check_refusal(read_answer(connection))


def test_ten_times_too_many_at_once(engine: FakeClient) -> None:
    engine.step_seconds = 0.02
    with served(engine) as (port, gate):
        url = f"http://127.0.0.1:{port}{COMPLETIONS}"

        def ask(_: int) -> int:
            return httpx.post(url, json=BODY, timeout=60).status_code

        with ThreadPoolExecutor(80) as pool:
            statuses = list(pool.map(ask, range(80)))
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 8
        assert statuses.count(200) == len(engine.prompts)
        assert httpx.post(url, json=BODY).status_code == 200
        assert gate.num_admitted == 0


def test_refusing_costs_the_admitted_little(engine: FakeClient) -> None:
    """Goodput under a flood is nine tenths of what it is without."""
    engine.step_seconds = 0.02

    def seconds(port: int, gate: Any, *, flood: bool) -> float:
        over = threading.Event()

        def refuse() -> None:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
                while not over.is_set():
                    assert http.post(COMPLETIONS, json=BODY).status_code in (200, 429)
                    time.sleep(0.01)

        started = time.perf_counter()
        with full(port, gate) as answers:
            flooder = threading.Thread(target=refuse)
            if flood:
                flooder.start()
            assert all(answer.result().status_code == 200 for answer in answers)
        taken = time.perf_counter() - started
        over.set()
        if flood:
            flooder.join()
        return taken

    with served(engine) as (port, gate):
        ratios: list[float] = []
        for _ in range(5):
            alone = seconds(port, gate, flood=False)
            ratios.append(alone / seconds(port, gate, flood=True))
            if ratios[-1] >= 0.9:
                return
    raise AssertionError(f"goodput fell to {ratios}")


@pytest.mark.parametrize(
    ("settings", "status"),
    [({"max_num_queued_tokens": 150}, 429), ({"max_num_queued_tokens": 250}, 200),
     ({"max_num_queued_tokens": 50, "kv_cache_tokens": 100}, 429),
     ({"max_num_queued_tokens": 50, "kv_cache_tokens": 200}, 200)],
)  # fmt: skip
def test_tokens_are_bounded_too(engine: FakeClient, settings: dict[str, int], status: int) -> None:
    engine.step_seconds = 0.05
    long = BODY | {"prompt": [1] * 100, "max_tokens": 4}
    with served(engine, **settings) as (port, gate):
        url = f"http://127.0.0.1:{port}{COMPLETIONS}"
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(httpx.post, url, json=long, timeout=60)
            wait_until(lambda: gate.num_tokens == 100)
            assert httpx.post(url, json=long, timeout=60).status_code == status
            assert first.result().status_code == 200
        assert httpx.post(url, json=long, timeout=60).status_code == 200
        assert gate.num_tokens == 0
