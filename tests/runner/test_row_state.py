"""The host's side of rows: exact limits, and nothing left of whoever had the row before."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler_output import NewRow, SchedulerOutput
from jaxllm.messages import EngineCoreRequest
from jaxllm.runner.row_layout import MAX_EOS_IDS, MAX_STOP_IDS, RowLayout
from jaxllm.runner.row_state import Patches, RowState
from jaxllm.sampling.metadata import SamplerMode
from jaxllm.sampling.rng import seed_words
from jaxllm.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from pallas_kernels.sampling.xla import thresholds_xla
from tests.fakes.tiny_engine import request

VOCAB = 2000
LAYOUT = RowLayout(4)


def step(*new_rows: NewRow, starts: int = 0, samples: bool = True, **changes: Any):
    rows = changes.pop("rows", [new.row for new in new_rows])
    count = len(rows)
    return SchedulerOutput(
        step_id=0,
        bucket=BatchBucket(8, 4, BatchKind.MIXED),
        rows=np.array(rows, np.int32),
        starts=np.full(count, starts, np.int32),
        num_new_tokens=np.ones(count, np.int32),
        samples=np.full(count, samples),
        num_decode_rows=0,
        new_rows=new_rows,
        **changes,
    )


def enter(state: RowState, row: int, item: EngineCoreRequest, *output: int) -> SchedulerOutput:
    plan = step(NewRow(row, item, (*item.prompt_token_ids, *output)))
    state.apply(plan)
    return plan


def on_device(state: RowState, before: np.ndarray | None = None) -> np.ndarray:
    """The row state after all pending patches, [rows, width]."""
    cells = np.zeros(state.num_cells, np.int32) if before is None else before.reshape(-1).copy()
    index, value = state.patches.take(len(state.patches))
    cells[index] = value
    return cells.reshape(-1, state.layout.width)


def row_state() -> RowState:
    return RowState(LAYOUT, max_num_seqs=3, vocab_size=VOCAB)


EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 5,
    "presence_penalty": 1.0,
    "logit_bias": {3: 1.0},
    "min_tokens": 2,
    "stop_token_ids": [9],
    "allowed_token_ids": [1, 2, 3],
    "logprobs": 2,
    "prompt_logprobs": 1,
}


def test_a_reused_row_remembers_nothing() -> None:
    used, fresh = row_state(), row_state()
    enter(used, 1, request("first", [1, 2, 3], **EVERYTHING))
    assert used.masked[1] and used.logprobs[1]
    cells = on_device(used)
    used.resets.clear()
    plan = enter(used, 1, request("second", [4, 5]))
    assert used.mode_of(plan) is SamplerMode.GREEDY
    enter(fresh, 1, request("second", [4, 5]))
    assert not used.masked.any() and not used.logprobs.any()
    assert not used.masks and not used.resets and not used.scores_prompts(plan)
    got, want = on_device(used, cells), on_device(fresh)
    np.testing.assert_array_equal(got[1, : LAYOUT.stop_ids], want[1, : LAYOUT.stop_ids])
    for name in ("num_stop_ids", "num_bias"):
        assert got[1, LAYOUT.columns[name]] == 0


def test_lists_of_full_length_stay_in_their_columns() -> None:
    state = row_state()
    bias = {token: token / 100 for token in range(MAX_LOGIT_BIAS)}
    stops = list(range(100, 100 + MAX_STOP_TOKEN_IDS))
    eos = tuple(range(1000, 1000 + MAX_EOS_IDS))
    item = request(
        "full", [1], logit_bias=bias, stop_token_ids=stops, min_tokens=1, eos_token_ids=eos
    )
    enter(state, 1, item)
    state.apply(step(rows=[1], new_blocks=tuple((1, i, 7 + i) for i in range(4))))
    cells = on_device(state)
    assert not cells[[0, 2, 3]].any()
    row = cells[1]
    stop_ids = row[LAYOUT.stop_ids : LAYOUT.stop_ids + MAX_STOP_IDS]
    assert sorted(stop_ids.tolist()) == sorted([*eos, *stops])
    assert row[LAYOUT.columns["num_stop_ids"]] == MAX_STOP_IDS
    ids = row[LAYOUT.bias_ids : LAYOUT.bias_values]
    values = row[LAYOUT.bias_values : LAYOUT.block_table].view(np.float32)
    assert dict(zip(ids.tolist(), values.tolist(), strict=True)) == {
        token: np.float32(value) for token, value in bias.items()
    }
    assert row[LAYOUT.block_table :].tolist() == [7, 8, 9, 10]


def test_an_id_that_is_named_twice_takes_one_place() -> None:
    state = row_state()
    stops = list(range(MAX_STOP_TOKEN_IDS))
    item = request("r", [1], stop_token_ids=stops, min_tokens=1, eos_token_ids=(0, 5, 63))
    enter(state, 0, item)
    assert on_device(state)[0, LAYOUT.columns["num_stop_ids"]] == MAX_STOP_TOKEN_IDS


def test_ignored_eos_is_not_banned() -> None:
    state = row_state()
    enter(state, 0, request("r", [1], min_tokens=1, ignore_eos=True, eos_token_ids=(5,)))
    assert on_device(state)[0, LAYOUT.columns["num_stop_ids"]] == 0


def test_min_tokens_beyond_int32_ends_with_the_request() -> None:
    state = row_state()
    item = request("r", [1, 2, 3], max_tokens=5)
    params = request("r", [1], 2**31 - 1, min_tokens=2**31 - 1).sampling_params
    enter(state, 0, EngineCoreRequest("r", item.prompt_token_ids, params, max_tokens=5))
    assert on_device(state)[0, LAYOUT.columns["stop_ban_end"]] == 3 + 5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_every_bit_of_a_seed_reaches_the_device(seed: int) -> None:
    state = row_state()
    enter(state, 2, request("r", [1], seed=seed))
    row = on_device(state)[2]
    words = [row[LAYOUT.columns[name]] for name in ("seed_high", "seed_low")]
    assert words == list(seed_words(seed))
    high, low = (int(word) & (2**32 - 1) for word in words)
    assert (high << 32 | low) == seed % 2**64


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-300])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    state = row_state()
    enter(state, 0, request("r", [1], temperature=temperature))
    assert state.mode_of(step(rows=[0])) is SamplerMode.GREEDY
    assert on_device(state)[0, LAYOUT.columns["temperature"]] == 0


@pytest.mark.parametrize("top_p", [1e-30, 1e-50])
def test_a_top_p_next_to_nothing_keeps_the_best(top_p: float) -> None:
    state = row_state()
    enter(state, 0, request("r", [1], temperature=1.0, top_p=top_p))
    kept = on_device(state)[0].view(np.float32)[LAYOUT.columns["top_p"]]
    x, one = jnp.asarray([[1.0, 3.0, 2.0]], jnp.float32), jnp.ones((1,), jnp.float32)
    threshold = thresholds_xla(x, one, jnp.zeros((1,), jnp.int32), jnp.asarray([kept]), 0 * one)
    assert (x[0] >= threshold[0]).tolist() == [False, True, False]


def test_a_resumed_mask_knows_the_output_but_not_the_prompt() -> None:
    for output, banned in (((), False), ((5,), False), ((5, 6), True), ((5, 6, 8), False)):
        state = row_state()
        item = request("r", [1, 5, 6], bad_words_token_ids=((5, 6, 7),))
        ((slot, mask),) = state.masks_of(enter(state, 1, item, *output))
        words = np.full(-(-VOCAB // 32), -1, np.int32)
        mask.narrow(words)
        assert slot == 0
        assert (words[0] >> 7) & 1 == (not banned), output


def test_only_slots_that_sample_wait_for_their_mask() -> None:
    state = row_state()
    enter(state, 0, request("plain", [1]))
    enter(state, 1, request("masked", [1], allowed_token_ids=[1]))
    assert [slot for slot, _ in state.masks_of(step(rows=[0, 1]))] == [1]
    assert state.masks_of(step(rows=[0, 1], samples=False)) == []


def test_a_prompt_is_scored_up_to_its_last_token_and_again_after_a_preemption() -> None:
    state = row_state()
    item = request("r", [1, 2, 3, 4], prompt_logprobs=0)
    enter(state, 1, item)
    for _ in range(2):
        scored = [state.scores_prompts(step(rows=[1], starts=start)) for start in range(6)]
        assert scored == [True, True, True, False, False, False]
        enter(state, 1, item, 9, 9)
    enter(state, 1, request("one", [1], prompt_logprobs=0))
    assert not state.scores_prompts(step(rows=[1]))


@pytest.mark.parametrize(
    ("params", "mode"),
    [
        ({"top_p": 0.5}, "greedy"),  # of one token
        ({"temperature": 1.0}, "random"),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, "random"),
        ({"frequency_penalty": 0.1}, "full"),
        ({"presence_penalty": 0.1}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
        ({"logit_bias": {1: 1.0}}, "full"),
        ({"min_tokens": 1}, "full"),
        ({"allowed_token_ids": [1]}, "full"),
        ({"bad_words_token_ids": ((1,),)}, "full"),
        ({"logprobs": 0}, "full"),
    ],
)
def test_the_mode_is_the_least_that_serves_the_rows_of_the_step(
    params: dict[str, Any], mode: str
) -> None:
    state = row_state()
    enter(state, 0, request("plain", [1]))
    enter(state, 1, request("more", [1], **params))
    assert state.mode_of(step(rows=[0])) is SamplerMode.GREEDY
    assert state.mode_of(step(rows=[1])) is state.mode_of(step(rows=[0, 1])) is SamplerMode(mode)
    enter(state, 1, request("next", [1]))
    assert state.mode_of(step(rows=[1])) is SamplerMode.GREEDY


def test_counts_start_anew_only_for_rows_with_penalties() -> None:
    state = row_state()
    enter(state, 0, request("plain", [1]))
    enter(state, 2, request("penalised", [1], repetition_penalty=1.1))
    assert state.resets == [2]


def test_of_two_writes_to_a_cell_the_later_one_counts() -> None:
    patches = Patches()
    patches.write(10, [1, 2, 3])
    patches.write(11, [9])
    index, value = patches.take(2)
    index2, value2 = patches.take(5)
    assert dict(zip(index + index2, value + value2, strict=True)) == {10: 1, 11: 9, 12: 3}
    assert len(index) == 2 and len(patches) == 0
