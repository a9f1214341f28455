"""A span, first tokens that see ahead, is fed in one step, whatever else the step would be."""

import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.request_validator import validate_request
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from jaxllm.simulation.fake_executor import FakeExecutor
from jaxllm.simulation.plans import SPAN
from tests.fakes.plans import make_plan, make_request

PLAN = make_plan(
    max_model_len=400, max_num_seqs=4, max_num_batched_tokens=256, num_blocks=400, spans=True
)
WIDE = make_request("wide", 110, attention_params={SPAN: 100})


class Steps:
    def __init__(self, *requests: EngineCoreRequest):
        self.scheduler, self.executor = Scheduler(PLAN), FakeExecutor(PLAN)
        for request in requests:
            self.scheduler.add_request(request)

    def step(self, limit: int | None = None) -> dict[str, int]:
        """Tokens fed, by request."""
        step = self.scheduler.schedule(limit)
        assert step is not None
        self.scheduler.update(step, self.executor.fetch(self.executor.dispatch(step)))
        return fed(step)

    def until(self, name: str, limit: int | None = None) -> int:
        """Tokens that are fed when the request begins."""
        steps = (self.step(limit) for _ in range(5))
        return next(tokens[name] for tokens in steps if name in tokens)


def fed(step: SchedulerOutput) -> dict[str, int]:
    return dict(zip(step.request_ids, step.num_new_tokens.tolist(), strict=True))


def test_a_program_is_not_filled_by_a_part_of_it() -> None:
    """Of 110 tokens the program of 64 would be filled first, and the rest follow."""
    assert Steps(make_request("plain", 100)).step() == {"plain": 64}
    assert Steps(WIDE).step()["wide"] >= 100


def test_a_limit_on_steps_with_decoding_rows_makes_way_for_it() -> None:
    steps = Steps(make_request("decodes", 5, 50))
    steps.step()
    steps.scheduler.add_request(WIDE)
    assert steps.step(limit=8)["wide"] >= 100


def test_it_waits_for_prefills_before_it_and_nobody_overtakes_it() -> None:
    steps = Steps(make_request("long", 300, 0), WIDE, make_request("later", 3))
    assert steps.step() == {"long": 256}
    assert steps.step() == {"long": 44}  # which with a part of the next one would fill a program
    both = steps.step()
    assert both["wide"] >= 100 and both["later"] == 3


def test_what_is_in_the_cache_of_it_is_not_fed_again() -> None:
    steps = Steps(WIDE)
    steps.step()
    again = make_request("again", WIDE.prompt_token_ids[:102], attention_params={SPAN: 100})
    steps.scheduler.add_request(again)
    assert steps.until("again") <= 2
    other = (*WIDE.prompt_token_ids[:99], 1 + WIDE.prompt_token_ids[99])
    steps.scheduler.add_request(make_request("other", other, attention_params={SPAN: 100}))
    assert steps.until("other") == 100


def test_no_request_waits_for_ever() -> None:
    """The widest span that is accepted, while all other rows decode."""
    longest = 256 - 4 + 1
    steps = Steps(*(make_request(f"r{i}", 3, 60) for i in range(3)))
    steps.step()
    steps.scheduler.add_request(make_request("widest", longest, attention_params={SPAN: longest}))
    assert steps.until("widest", limit=1) == longest
    wider = make_request("wider", 300, attention_params={SPAN: longest + 1})
    with pytest.raises(InvalidRequestError, match=f"up to {longest} of one request"):
        validate_request(wider, 40, 400, attention_params=PLAN.attention_params)
