"""The simulation is worth something only if it finds bugs. Each of these it must find.

Where ``books`` is False the integrity check is switched off: the bug must show in the answers
themselves, because the fake executor reads every token back through the block tables.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from jaxllm.core import commit
from jaxllm.core.block_pool import BlockPool
from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.request import Request
from jaxllm.core.row_table import FREE, RowTable
from jaxllm.core.scheduler import Scheduler
from tests.fakes import simulation

Patch = pytest.MonkeyPatch


def share_a_block(patch: Patch) -> None:
    allocate = BlockPool.allocate

    def again(self: BlockPool, n: int) -> list[int] | None:
        ids = allocate(self, n)
        if ids:
            self._blank.appendleft(ids[-1])  # still free for the next one
        return ids

    patch.setattr(BlockPool, "allocate", again)
    patch.setattr(
        BlockPool, "free", lambda self, ids: self._blank.extend(set(ids) - set(self._blank))
    )


def leak_blocks(patch: Patch) -> None:
    patch.setattr(
        KVCacheManager, "free", lambda self, request: self._tables.pop(request.request_id)
    )


def own_the_null_block(patch: Patch) -> None:
    init = BlockPool.__init__

    def with_null(self: BlockPool, num_blocks: int) -> None:
        init(self, num_blocks)
        self._blank.appendleft(0)

    patch.setattr(BlockPool, "__init__", with_null)


def cross_a_block_late(patch: Patch) -> None:
    def crossing_rows(self: RowTable) -> np.ndarray:
        rows = self.decoding_rows()
        return rows[self.num_computed[rows] > self.capacity[rows]]

    patch.setattr(RowTable, "crossing_rows", crossing_rows)


def believe_stale_results(patch: Patch) -> None:
    def update(self: Scheduler, step, output):
        self.in_flight.popleft()
        return commit.commit_step(self, step, output, self.rows.tenancy[step.rows] != FREE)

    patch.setattr(Scheduler, "update", update)


def forget_output_on_resume(patch: Patch) -> None:
    patch.setattr(Request, "token_ids", property(lambda self: self.core_request.prompt_token_ids))


def run_past_the_end(patch: Patch) -> None:
    def decoding_rows(self: RowTable) -> np.ndarray:
        prefilled = (self.num_computed >= self.prefill_len) & (self.tenancy != FREE)
        return np.flatnonzero(prefilled)

    patch.setattr(RowTable, "decoding_rows", decoding_rows)


def keep_row_state(patch: Patch) -> None:
    build = Scheduler._build_step
    patch.setattr(Scheduler, "_build_step", lambda *args: replace(build(*args), finished_rows=()))


def skip_a_prompt_token(patch: Patch) -> None:
    join = RowTable.join

    def join_ahead(self: RowTable, request: Request) -> int:
        row = join(self, request)
        self.num_computed[row] = request.num_tokens > 4
        return row

    patch.setattr(RowTable, "join", join_ahead)


def score_the_prompt_twice(patch: Patch) -> None:
    original = commit.prompt_logprobs

    def from_start(request: Request, *args):
        if request.num_preemptions:
            request.num_prompt_logprobs = 0
        return original(request, *args)

    patch.setattr(
        Request,
        "owes_prompt_logprobs",
        property(lambda self: self.core_request.sampling_params.prompt_logprobs is not None),
    )
    patch.setattr(commit, "prompt_logprobs", from_start)


def ignore_min_tokens(patch: Patch) -> None:
    def check_stop(request: Request) -> tuple[str, int | None] | None:
        token = request.output_token_ids[-1] if request.output_token_ids else None
        if token in request.core_request.eos_token_ids and token in request.stop_ids:
            return "stop", None
        if token in request.stop_ids:
            return "stop", token
        return (
            ("length", None) if len(request.output_token_ids) >= request.max_output_tokens else None
        )

    patch.setattr(commit, "check_stop", check_stop)


def lose_a_preempted_request(patch: Patch) -> None:
    def preempt(self: Scheduler, request: Request) -> None:
        self._leave_row(request)
        self.num_preemptions += 1

    patch.setattr(Scheduler, "_preempt", preempt)


def give_logprobs_of_another_row(patch: Patch) -> None:
    original = commit.token_logprobs
    patch.setattr(commit, "token_logprobs", lambda a, i, *rest: original(a, max(0, i - 1), *rest))


def take_the_wrong_offset(patch: Patch) -> None:
    original = commit.prompt_logprobs
    patch.setattr(
        commit,
        "prompt_logprobs",
        lambda r, a, offset, *rest: original(r, a, max(0, offset - 1), *rest),
    )


BUGS: list[tuple[Callable[[Patch], None], bool]] = [
    (share_a_block, True),
    (share_a_block, False),
    (leak_blocks, True),
    (leak_blocks, False),
    (own_the_null_block, True),
    (own_the_null_block, False),
    (cross_a_block_late, False),
    (believe_stale_results, False),
    (forget_output_on_resume, False),
    (run_past_the_end, False),
    (keep_row_state, False),
    (skip_a_prompt_token, False),
    (score_the_prompt_twice, False),
    (ignore_min_tokens, False),
    (lose_a_preempted_request, True),
    (give_logprobs_of_another_row, False),
    (take_the_wrong_offset, False),
]


@pytest.mark.parametrize(
    ("plant", "books"), BUGS, ids=lambda value: getattr(value, "__name__", value)
)
def test_simulation_finds(plant: Callable[[Patch], None], books: bool, monkeypatch: Patch):
    plant(monkeypatch)
    if not books:
        monkeypatch.setattr(simulation, "check_integrity", lambda *args: None)
    for seed in range(60):
        try:
            simulation.Simulation(seed).run()
        except Exception:
            return
    pytest.fail("60 runs did not notice")
