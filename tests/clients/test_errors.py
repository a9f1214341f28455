"""Every error of the API, as real clients understand it: class of exception, number of retries."""

from typing import Any

import pytest

from tests.clients.conftest import FaultyServer, Run
from tests.clients.rows import ROWS, Row

pytestmark = pytest.mark.slow

# Nobody but a browser is refused the header Host; in Node it cannot be set.
NODE_CANNOT = {"other_host"}
NODE_CLASSES = {"APIStatusError": "APIError"}


def expected(row: Row, error: str) -> dict[str, Any]:
    return {"error": error, "status": row.status, "code": row.code, "requests": row.requests}


def test_openai_python(run: Run, faulty: FaultyServer) -> None:
    got = run("openai_errors.py", "openai", url=faulty.url, rows=[row.as_json() for row in ROWS])
    assert got == {row.name: expected(row, row.error) for row in ROWS}


def test_openai_node(run: Run, faulty: FaultyServer) -> None:
    rows = [row for row in ROWS if row.name not in NODE_CANNOT]
    got = run("openai_errors.mjs", "node", url=faulty.url, rows=[row.as_json() for row in rows])
    assert got == {row.name: expected(row, NODE_CLASSES.get(row.error, row.error)) for row in rows}


# Those that need nothing but a prompt, a model and a key.
SIMPLE = ("too_long", "unknown_model", "wrong_key", "queue_full", "engine_away", "our_fault",
          "request_failed", "heals", "stream_breaks")  # fmt: skip


# llama-index asks its client again, which has asked again itself; it does so after any 429 or 5xx.
OWN_RETRIES = {"llama_index": 2}
OWN_CLASSES = {"litellm": {"engine_away": "ServiceUnavailableError"}}


@pytest.mark.parametrize("name", ["langchain", "llama_index", "litellm"])
def test_others(run: Run, faulty: FaultyServer, name: str) -> None:
    """They raise openai-python's classes, or subclasses of them, after as many requests."""
    rows = [row for row in ROWS if row.name in SIMPLE]
    given = [row.as_json() | {"request_id": f"{name}-{row.name}"} for row in rows]
    got = run(f"{name}_use.py", name, url=faulty.url, rows=given)
    for row in rows:
        wanted = OWN_CLASSES.get(name, {}).get(row.name, row.error)
        assert wanted in (got[row.name] or [""]), (row.name, got[row.name])
        own = OWN_RETRIES.get(name, 1) if row.status in (429, 500, 503) else 1
        assert faulty.requests[f"{name}-{row.name}"] == own * row.requests, row.name
