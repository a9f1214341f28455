"""When an engine that dies is past hope."""

import pytest

from jaxllm.frontend.death_record import DeathRecord


@pytest.mark.parametrize(
    ("served", "hopeless"),
    [
        ([1, 1], False),
        ([1, 1, 1], True),
        ([1000, 1, 1], True),  # it ran for long, and now it keeps dying
        ([1000, 30, 30], True),
        ([1000, 31, 30], False),
        ([0, 0, 0], True),  # it does not come up
        ([1, 1, 100, 1], False),
        ([1, 1, 100, 1, 1], True),
        ([-5, -5, -5], True),
    ],
)
def test_three_deaths_within_a_minute_of_service(served: list[float], hopeless: bool) -> None:
    record = DeathRecord()
    for seconds in served:
        assert not record.hopeless
        record.add(seconds)
    assert record.hopeless is hopeless
