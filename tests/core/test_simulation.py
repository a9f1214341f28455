import pytest

from tests.fakes.simulation import Simulation


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_every_answer_equals_the_request_run_alone(first: int):
    for seed in range(first, first + 20):
        try:
            Simulation(seed).run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
