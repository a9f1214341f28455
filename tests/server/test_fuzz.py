"""Random bad requests: no unexpected status, nothing against the schema, the engine as before.

``scripts/soak_fuzz.py`` sends many more.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import fuzz
from tests.server.attacked_server import EOS, AttackedServer, attacked_server
from tests.server.schema_fuzz import MAX_BODY_BYTES, PROGRAM, run_schemathesis

BODIES, RAW = 3000, 3000
SEED = 20
ENDS = (*EOS, *range(192, 256))  # an answer whose length nobody says has four tokens


@pytest.fixture(scope="module")
def server(tiny_tokenizer_dir: Path) -> Iterator[AttackedServer]:
    with attacked_server(
        tiny_tokenizer_dir, step_seconds=0, eos_token_ids=ENDS, max_body_bytes=MAX_BODY_BYTES
    ) as server:
        yield server


def test_the_same_seed_gives_the_same_requests() -> None:
    one, two = fuzz.Mutator(5), fuzz.Mutator(5)
    assert [one.body() for _ in range(50)] == [two.body() for _ in range(50)]
    assert len({one.raw() for _ in range(50)}) > 40


@pytest.mark.slow
def test_bodies(server: AttackedServer) -> None:
    with server.as_before():
        tally = fuzz.send_bodies(server.url, SEED, BODIES)
    assert not tally.failures, "\n".join(tally.failures[:5])
    assert tally.total == BODIES
    assert tally.statuses[200] > BODIES // 10 and tally.statuses[400] > BODIES // 3


@pytest.mark.slow
def test_raw(server: AttackedServer) -> None:
    with server.as_before():
        tally = fuzz.send_raw(server.port, SEED, RAW)
    assert not tally.failures, "\n".join(tally.failures[:5])
    assert tally.total == RAW
    assert tally.statuses[200] > RAW // 50 and tally.statuses[400] > RAW // 3


@pytest.mark.slow
@pytest.mark.skipif(
    not PROGRAM.exists(), reason="no schemathesis here: run scripts/clients.sh first"
)
def test_requests_from_our_own_schema(server: AttackedServer) -> None:
    with server.as_before():
        report = run_schemathesis(server.url, max_examples=8, seed=SEED, limit_s=280)
    assert report.passed, report.output
    assert report.num_requests > 500
