"""A pool of a tenth of what the rows would need: all finish, and nobody is thrown out often."""

from random import Random

import pytest

from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core import sparing
from jaxllm.core.request import Request
from jaxllm.core.scheduler import Scheduler
from jaxllm.simulation.answers import Answers
from jaxllm.simulation.checked import CheckedCore, CheckedExecutor
from jaxllm.simulation.faults import Faults
from jaxllm.simulation.oracle import run_alone
from tests.fakes.plans import VOCAB_SIZE, make_plan, make_request

ROWS, LONGEST, BLOCK_SIZE, NUM_REQUESTS = 24, 96, 4, 200


def serve(policy: str, host_blocks: int) -> list[Request]:
    """All requests, each with an answer that is its own."""
    random = Random(policy)
    plan = make_plan(
        max_model_len=LONGEST,
        max_num_seqs=ROWS,
        max_num_batched_tokens=64,
        block_size=BLOCK_SIZE,
        num_blocks=1 + ROWS * LONGEST // BLOCK_SIZE // 10,
        host_blocks=host_blocks,
    )
    scheduler, faults, answers = Scheduler(plan, SchedulingConfig(policy)), Faults(), Answers()
    executor = CheckedExecutor(plan, faults)
    executor.watch(scheduler)
    core = CheckedCore(scheduler, executor)
    coming = [
        make_request(
            f"r{i}", random.randint(1, 16), random.randint(20, 80), priority=random.choice((0, 1))
        )
        for i in range(NUM_REQUESTS)
    ]
    requests: list[Request] = []
    while coming or core.has_work():
        for _ in range(min(len(coming), random.randint(0, 2))):
            request = coming.pop()
            core.add_request(request)
            answers.expect(request.request_id)
            requests.append(scheduler.requests[request.request_id])
        for name in answers.take(core.step()):
            (request,) = [r.core_request for r in requests if r.request_id == name]
            assert answers.by_id[name] == run_alone(request, VOCAB_SIZE)
    assert all(request.finished for request in requests) and len(requests) == NUM_REQUESTS
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    return requests


@pytest.mark.parametrize("most", [sparing.MAX_PREEMPTIONS, 2])
@pytest.mark.parametrize("host_blocks", [0, 100])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_is_preempted_again_and_again(
    policy: str, host_blocks: int, most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sparing, "MAX_PREEMPTIONS", most)
    requests = serve(policy, host_blocks)
    often = [request.num_preemptions for request in requests]
    assert max(often) <= most
    assert sum(often) > NUM_REQUESTS, "there was no want of blocks"
