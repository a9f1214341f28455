"""Whatever the schema and however bad the model: an answer that ends follows it."""

import pytest

from jaxllm import LLM
from tests.grammar.rounds import Tally, run_round
from tests.grammar.schemas import follows

COUNT = 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_follow_their_schemas(llm: LLM) -> None:
    tally = Tally()
    run_round(llm, 0, COUNT, tally)
    assert tally.wrong == [] and tally.surprises == []
    assert tally.num_refused == COUNT // 4
    assert sum(tally.ends.values()) == COUNT
    assert tally.share_finished >= 0.9


def test_the_judge_is_awake() -> None:
    schema = {"type": "array", "items": {"type": "string", "format": "ipv4"}}
    assert follows(schema, '["127.0.0.1"]')
    assert not follows(schema, '["127.0.0.256"]') and not follows(schema, "{}")
