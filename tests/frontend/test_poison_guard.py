"""What is refused after the engine died, for how long, and what clears it."""

import pytest

from jaxllm.errors import RequestFailedError
from jaxllm.frontend.poison_guard import MAX_CONTENTS, MEMORY_S, Content, PoisonGuard
from jaxllm.sampling_params import SamplingParams


class Scenario:
    def __init__(self) -> None:
        self.now = 1000.0
        self.guard = PoisonGuard(clock=lambda: self.now)

    def refused(self, content: Content) -> bool:
        try:
            self.guard.check(content)
        except RequestFailedError:
            return True
        return False


def content(*token_ids: int, **params: object) -> Content:
    return token_ids, SamplingParams(**params)  # type: ignore[arg-type]


POISON, OTHER = content(1, 2), content(3)


def test_the_second_death_is_the_last() -> None:
    scenario = Scenario()
    guard = scenario.guard
    assert not scenario.refused(POISON)
    guard.died([POISON, OTHER])
    assert not scenario.refused(POISON)
    guard.died([POISON])
    assert scenario.refused(POISON) and not scenario.refused(OTHER)
    with pytest.raises(RequestFailedError, match=r"died 2 times.*5 minutes"):
        guard.check(POISON)


def test_the_same_content_is_one_whoever_sends_it() -> None:
    scenario = Scenario()
    scenario.guard.died([POISON, content(1, 2)])  # twice at one death counts once
    assert not scenario.refused(POISON)
    scenario.guard.died([([1, 2], SamplingParams())])
    assert scenario.refused(POISON)
    assert not scenario.refused(content(1, 2, temperature=0.5))
    assert not scenario.refused(content(1, 2, seed=4))


def test_what_came_to_its_end_is_harmless() -> None:
    scenario = Scenario()
    scenario.guard.died([POISON])
    scenario.guard.finished(POISON)
    scenario.guard.died([POISON])
    assert not scenario.refused(POISON)


def test_it_is_forgotten_after_a_while() -> None:
    scenario = Scenario()
    for _ in range(2):
        scenario.guard.died([POISON])
    scenario.now += MEMORY_S + 1
    assert not scenario.refused(POISON)
    scenario.guard.died([POISON])
    assert not scenario.refused(POISON)


def test_memory_is_bounded() -> None:
    scenario = Scenario()
    many = [content(number) for number in range(MAX_CONTENTS + 10)]
    for _ in range(2):
        scenario.guard.died(many)
    assert sum(scenario.refused(each) for each in many) == MAX_CONTENTS


def test_parameters_of_every_kind_have_a_fingerprint() -> None:
    scenario = Scenario()
    rich = content(1, logit_bias={5: 1.0, 3: -1.0}, stop=["a"], allowed_token_ids=[3, 5])
    same = content(1, logit_bias={5: 1.0, 3: -1.0}, stop=["a"], allowed_token_ids=[3, 5])
    scenario.guard.died([rich])
    scenario.guard.died([same])
    assert scenario.refused(rich)
