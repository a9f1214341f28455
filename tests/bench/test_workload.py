"""The workloads are those that other engines were measured with, to the last id."""

import pytest

from jaxllm.bench.workload import HIGHEST_ID, make_workload, workload_a, workload_b, workload_decode
from jaxllm.errors import InvalidRequestError


def test_shas() -> None:
    assert workload_a().sha() == "7deed685e86061b2"
    assert workload_b().sha() == "e28f4d374f31e79e"
    assert workload_b(128).sha() == "d96b92ccda4b9aec"
    assert workload_decode(8, 128, 64).sha() == "39a403a324e422f5"


def test_descriptions() -> None:
    described = workload_b().describe()
    assert (described["n"], described["in_tokens"], described["out_tokens"]) == (512, 109654, 99770)
    assert workload_b().longest <= 2048


def test_folding_keeps_lengths_and_says_so() -> None:
    work = workload_a(2, 16, 4)
    folded = work.folded(100)
    assert folded.folded_to == 100
    assert folded.prompts[1] == [token_id % 100 for token_id in work.prompts[1]]
    assert folded.output_lens == work.output_lens
    assert work.folded(HIGHEST_ID) is work


def test_own_sizes() -> None:
    work = make_workload("decode", 3, 5, 7)
    assert [len(prompt) for prompt in work.prompts] == [5] * 3
    assert work.output_lens == [7] * 3
    assert make_workload("b", 4).prompts == workload_b(4).prompts


def test_random_is_seeded() -> None:
    def prompts(**more: int) -> list[list[int]]:
        return make_workload("random", 2, 9, 3, **more).prompts

    assert prompts() == prompts(seed=0) != prompts(seed=1)
    with pytest.raises(InvalidRequestError, match="seed of its own"):
        make_workload("a", seed=1)


@pytest.mark.parametrize("arguments", [("c",), ("a", 0), ("a", 1, -1), ("b", 1, 5)])
def test_refusals(arguments: tuple[object, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        make_workload(*arguments)  # pyright: ignore[reportArgumentType]
