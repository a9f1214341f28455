"""What counts as progress, and when silence is too long; a fake clock, ticks of real time."""

import asyncio

from jaxllm.frontend.watchdog import Watchdog
from jaxllm.messages import EngineStats, StepOutputs


class Clock:
    """Every look at it is ``step`` seconds later."""

    def __init__(self, step: float):
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def stats(running: int, steps: int, waiting: int = 0) -> EngineStats:
    return EngineStats(running, waiting, 0.0, 0, steps)


def test_progress_is_results_more_steps_or_nothing_to_do() -> None:
    dog = Watchdog(60.0)

    def after(message: StepOutputs | EngineStats) -> float:
        dog.silent_s = 50.0
        dog.heard(message)
        return dog.silent_s

    assert after(stats(1, 7)) == 0.0
    assert after(stats(1, 7)) == 50.0, "the loop turns, but no step was made"
    assert after(stats(0, 7, waiting=3)) == 50.0, "requests wait and nothing runs"
    assert after(stats(1, 8)) == 0.0
    assert after(stats(0, 8)) == 0.0
    assert after(StepOutputs(9)) == 0.0


def test_late_long_before_it_hangs() -> None:
    dog = Watchdog(60.0)
    assert not dog.late
    dog.silent_s = 16.0
    assert dog.late
    dog.heard(StepOutputs(1))
    assert not dog.late


def test_silence_is_answered_by_one_ping_and_then_an_alarm() -> None:
    pings: list[float] = []
    dog = Watchdog(0.2)
    asyncio.run(asyncio.wait_for(dog.watch(lambda: pings.append(dog.silent_s)), 30))
    assert len(pings) == 1 and 0.02 < pings[0] < 0.2
    assert 0.2 <= dog.silent_s < 0.4


def test_an_answered_ping_is_followed_by_another() -> None:
    dog = Watchdog(0.2)
    pings: list[int] = []

    def ping() -> None:
        pings.append(1)
        if len(pings) < 4:
            dog.heard(stats(0, 1))

    asyncio.run(asyncio.wait_for(dog.watch(ping), 30))
    assert len(pings) == 4


def test_time_in_which_we_stood_still_does_not_count() -> None:
    dog = Watchdog(0.2, Clock(3600.0))  # an hour passes in every tick of 10 ms

    async def watch() -> float:
        started = asyncio.get_running_loop().time()
        await dog.watch(lambda: None)
        return asyncio.get_running_loop().time() - started

    assert asyncio.run(watch()) >= 0.09  # ten ticks, each counted twice at most
