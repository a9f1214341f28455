"""Short prompts do not wait for long ones, and long ones get all that nobody else wants."""

from random import Random

import pytest

from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core.prefill_shares import PrefillShares
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from tests.core.test_policies_in_steps import step_of
from tests.fakes.plans import make_plan, make_request

LONG = 16_000
BUDGET = 2048


def loaded(num_decoding: int = 0, policy: str = "fcfs", **scheduling) -> Scheduler:
    """A scheduler with requests that decode for long and a long prefill under way."""
    plan = make_plan(
        max_model_len=20_000,
        max_num_seqs=64,
        max_num_batched_tokens=BUDGET,
        block_size=64,
        num_blocks=2000,
    )
    scheduler = Scheduler(plan, SchedulingConfig(policy, **scheduling))
    for i in range(num_decoding):
        scheduler.add_request(make_request(f"d{i}", 1, 500))
    if num_decoding:
        step_of(scheduler)
    scheduler.add_request(make_request("long", LONG, 4))
    step_of(scheduler)
    return scheduler


def tokens(step: SchedulerOutput) -> dict[str, int]:
    return dict(zip(step.request_ids, step.num_new_tokens.tolist(), strict=True))


def test_in_turn_until_nothing_is_left():
    shares = PrefillShares.of(budget=100, threshold=20, wanted_by_short=30)
    assert [shares.take(500), shares.take(20), shares.take(10), shares.take(500)] == [70, 20, 10, 0]


def test_short_ones_take_half_at_most_from_a_long_one():
    shares = PrefillShares.of(budget=100, threshold=20, wanted_by_short=900)
    assert [shares.take(500)] + [shares.take(20) for _ in range(4)] == [50, 20, 20, 10, 0]


def test_a_long_one_that_must_begin_begins():
    shares = PrefillShares.of(budget=100, threshold=20, wanted_by_short=30)
    assert [shares.take(500), shares.take(500, at_least=1), shares.take(20)] == [70, 1, 20]
    assert shares.take_rest(499) == 9 and shares.left == 0


def test_alone_a_long_prefill_gets_the_whole_step():
    scheduler = loaded(num_decoding=40)
    assert tokens(step_of(scheduler))["long"] == BUDGET - 40


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_a_short_prompt_behind_a_long_one_begins_in_the_next_step(policy: str):
    for seed in range(10):
        random = Random(seed)
        scheduler = loaded(random.randint(0, 40), policy)
        for i in range(3):  # more long ones, under way or waiting before it
            scheduler.add_request(make_request(f"also long {i}", LONG, 4))
            if random.random() < 0.5:
                step_of(scheduler)
        size = random.randint(1, BUDGET // 4)
        scheduler.add_request(make_request("short", size, 4))
        step = step_of(scheduler)
        begun = 3  # long ones that just begin take a token each
        assert tokens(step)["short"] >= min(size, (BUDGET - 40) // 2 - begun), seed
        assert step.num_tokens >= 0.9 * BUDGET, "the others get what is left"


def test_under_a_flood_of_short_prompts_a_long_one_keeps_half_a_step():
    scheduler = loaded(num_decoding=20)
    steps = 0
    while scheduler.rows.prefilling_rows().size:
        while len(scheduler.waiting) < 30:
            scheduler.add_request(make_request(f"s{scheduler.num_steps}-{len(scheduler.waiting)}",
                                               400, 1))  # fmt: skip
        before = tokens(step_of(scheduler)).get("long", 0)
        steps += 1
        if "long" not in scheduler.requests or scheduler.requests["long"].output_token_ids:
            break
        assert before >= (BUDGET - 64) // 2
    assert steps <= 2 + LONG / ((BUDGET - 64) / 2)


def test_the_threshold_says_what_is_long():
    for threshold in (100, 1200):
        scheduler = loaded(long_prefill_token_threshold=threshold)
        scheduler.add_request(make_request("first", 1200, 4))
        scheduler.add_request(make_request("short", 100, 4))
        step = tokens(step_of(scheduler))
        if threshold == 100:  # first is long, too: it begins, and waits for the one before it
            assert (step["long"], step["first"], step["short"]) == (BUDGET - 101, 1, 100)
        else:
            assert (step["long"], step["first"]) == (BUDGET // 2, BUDGET // 2)


@pytest.mark.parametrize("limit", [0, 64, 1024])
def test_a_limit_holds_while_others_decode_and_prefills_go_on(limit: int):
    scheduler = loaded(num_decoding=40)
    step = scheduler.schedule(limit)
    assert step is not None
    # 128: the smallest program with room for 40 rows and 32 tokens of prefill
    assert step.num_tokens == max(limit, 128) and step.num_decode_rows == 40


def test_nobody_decodes_so_nothing_is_limited():
    scheduler = loaded()
    step = scheduler.schedule(64)
    assert step is not None and step.num_tokens == BUDGET
