from jaxllm.engine.clock import Clock, MonotonicClock


def test_time_does_not_go_back():
    clock: Clock = MonotonicClock()
    first = clock.now()
    assert clock.now() >= first
