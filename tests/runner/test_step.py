"""The compiled step: in place, closed, and containing failures."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import RecompilationError
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.params import model_def
from jaxllm.runner.model_runner import ModelRunner
from jaxllm.runner.planning import draft_plan
from jaxllm.runner.program_jobs import ProgramJobs, full_rows
from jaxllm.runner.programs import Programs
from jaxllm.runner.row_layout import row_buffers_spec
from jaxllm.runner.step import _count_tokens
from jaxllm.sampling.metadata import SamplerMode
from jaxllm.weights.json_file import read_json_object
from tests.fakes.tiny_engine import TinyEngine, request, tiny_plan

PROMPT = [5, 17, 80, 33, 2, 91, 14]


def test_decoding_equals_prefilling_the_same_tokens(engine: TinyEngine) -> None:
    """Each token that decoding gives is what a fresh prefill of everything before it gives."""
    for length in (1, 15, 16, 17, 31, 33):
        prompt = (PROMPT * 5)[:length]
        whole = engine.run([request("whole", prompt, 20)])["whole"].token_ids
        for count in range(1, 20, 4):
            one = engine.run([request("one", prompt + whole[:count], 1)])["one"].token_ids
            assert one == whole[count : count + 1], (length, count)


def test_warming_up_runs_every_program_and_leaves_no_trace(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request("a", [5, 6, 7], 6), request("b", [8] * 20, 6, temperature=1.0, seed=3)]
    expected = engine.run(requests)
    runner, used = engine.runner(), set[object]()
    find = engine.programs._find
    monkeypatch.setattr(engine.programs, "_find", lambda key: used.add(key) or find(key))
    runner.warm_up()
    assert used == set(engine.programs._compiled)
    core = EngineCore(Scheduler(engine.plan), runner)
    assert engine.run(requests, core) == expected


def test_no_program_copies_the_cache(engine: TinyEngine) -> None:
    """The donated cache is the output cache, and scratch memory is smaller than one layer's
    cache.
    """
    plan = tiny_plan(num_blocks=4097)
    programs = Programs(plan, engine.model, BACKEND)
    programs.compile(threads=2, progress=False)
    layer_bytes = 4097 * 2 * 2 * 16 * 8 * 4
    shape = "f32[4097,2,2,16,8]"
    for bucket in plan.buckets:
        compiled = programs.forward(bucket).executable
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < layer_bytes
        assert memory.alias_size_in_bytes >= plan.model.num_layers * layer_bytes
        copies = re.findall(re.escape(shape) + r"[^ ]* copy\(", compiled.as_text())
        assert not copies, bucket


def test_a_shape_that_was_not_compiled_is_an_error_that_names_it(engine: TinyEngine) -> None:
    with pytest.raises(RecompilationError, match=r"mixed\[48 tokens, 8 rows\]"):
        engine.programs.forward(BatchBucket(48, 8, BatchKind.MIXED))
    with pytest.raises(RecompilationError, match="sample 3 greedy"):
        engine.programs.sample(3, SamplerMode.GREEDY)


def test_programs_add_up_and_do_not_multiply(engine: TinyEngine) -> None:
    """Forward by bucket (4), sample by rows (2 and 8) and mode (3), and five of which there is one:
    score, recount, copy, save and load."""
    assert len(engine.programs) == 4 + 2 * 3 + 5


@pytest.mark.parametrize(
    ("counts", "rows"),
    [((1, 8, 64, 128, 256), (64, 128, 256)), ((1, 8), (8,)), ((1, 8, 40), (40,)), ((1,), (1,))],
)
def test_a_gpu_has_full_samplers_for_few_numbers_of_rows(
    counts: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    assert full_rows(counts, "sm_90") == full_rows(counts, "gpu") == rows
    assert full_rows(counts, "cpu") == counts


def test_a_full_step_takes_the_bucket_of_its_sampler(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the bucket of two rows has none."""
    item = request("r", PROMPT, 6, temperature=1.0, seed=4, frequency_penalty=0.5)
    want = engine.run([item])["r"].token_ids
    monkeypatch.setattr(engine.programs, "sampling_platform", "gpu")
    small = engine.plan.buckets[0]
    monkeypatch.delitem(engine.programs._compiled, ("sample", small.num_rows, SamplerMode.FULL))
    assert engine.run([item])["r"].token_ids == want


def test_a_decode_step_that_wants_more_takes_a_mixed_program_that_has_its_rows(
    engine: TinyEngine,
) -> None:
    small, others = BatchBucket(16, 2, BatchKind.MIXED), engine.plan.buckets
    runner = engine.runner(replace(engine.plan, buckets=(*others, small)))
    scheduler, taken = Scheduler(engine.plan), dict[int, BatchBucket]()
    for number in range(8):
        scheduler.add_request(request(f"r{number}", (1, 2), 9))
    step = scheduler.schedule()
    assert step is not None
    for rows in (2, 8):
        bucket = BatchBucket(rows, rows, BatchKind.DECODE)
        runner._rows.resets = [0]
        taken[rows] = runner._bucket(replace(step, bucket=bucket), SamplerMode.GREEDY)
    assert taken == {2: small, 8: BatchBucket(32, 8, BatchKind.MIXED)}


def test_prompts_are_scored_alike_together_and_alone(engine: TinyEngine) -> None:
    """A step of 3 x 20 tokens is scored in two pieces, of which the second prompt has a part each,
    and a step of 20 in one."""
    prompts = {f"r{i}": [i, *PROMPT * 3][:20] for i in range(3)}
    items = [request(name, prompt, 1, prompt_logprobs=1) for name, prompt in prompts.items()]
    together = engine.run(items)
    for item in items:
        pieces = together[item.request_id].prompt_logprobs
        alone = engine.run([item])[item.request_id].prompt_logprobs
        want = prompts[item.request_id][1:]
        assert [one.token_id for one in pieces] == [one.token_id for one in alone] == want
        found, expected = ([one.logprob for one in scored] for scored in (pieces, alone))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_greedy_rows_go_with_random_ones_where_there_is_no_sampler_of_theirs(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Hopper's kernels, for few rows."""
    items = [request(f"r{i}", PROMPT[: i + 1], 6) for i in range(3)]
    want = engine.run(items)
    for rows in (2, 8):
        monkeypatch.delitem(engine.programs._compiled, ("sample", rows, SamplerMode.GREEDY))
    assert engine.run(items) == want


@pytest.mark.parametrize(("swap_space", "count"), [(0.0, 24), (1.0, 26)])
def test_programs_of_an_engine_as_shipped_on_an_h200(swap_space: float, count: int) -> None:
    """Llama-3.1-8B, but for its layers, of which programs hold more without being more."""
    hf = read_json_object(Path("configs/models/llama-3.1-8b/config.json"))
    shape = replace(LlamaForCausalLM.config_from_hf(hf), num_layers=1)
    model = model_def(shape, "bfloat16", "sm_90")
    config = EngineConfig(model="m", swap_space=swap_space)
    plan = draft_plan(config, model, "bfloat16", "gpu", ("pallas", "test"))
    jobs = ProgramJobs(plan, model, BACKEND, "sm_90").jobs()
    assert len({job.name for job in jobs}) == len(jobs) == count
    assert jobs[0].name == "forward mixed[8192 tokens, 256 rows]"  # what takes longest comes first


def test_counts_of_tokens_stay_below_the_most_there_can_be(engine: TinyEngine) -> None:
    """32,767 repeats of a token would be followed by -32,768."""
    bucket, rows = engine.plan.buckets[0], engine.programs.rows
    program = engine.programs.step_program(bucket)
    buffers = jax.tree.map(
        lambda spec: jnp.zeros(spec.shape, spec.dtype), row_buffers_spec(rows, 8, 96)
    )
    state = np.zeros(buffers.state.shape, np.int32)  # repetition_penalty 0: a penalty
    packed = np.zeros(program.layout.size, np.int32)
    views = program.layout.views(packed)
    views.token_ids[:], views.positions[:], views.token_slots[:] = [7, 9], [3, 3], [0, 1]
    views.rows[:] = [0, 1]
    for count in (0, 30_000, 32_767):
        counts = jnp.full_like(buffers.output_counts, count)
        start = replace(buffers, output_counts=counts)
        found, _ = _count_tokens(start, jnp.asarray(state), jnp.asarray([7, 9]), views, rows)
        assert int(found[0, 7]) == int(found[1, 9]) == min(count + 1, 32_767)
        assert int(found[0, 9]) == count


def test_more_patches_than_a_step_carries(engine: TinyEngine) -> None:
    """Large logit biases go ahead in steps that compute nothing; answers stay right."""
    bias = {token: -50.0 for token in range(96) if token not in (40, 41)}
    wide = [request(f"w{i}", PROMPT[: i + 1], 6, logit_bias=bias) for i in range(8)]
    layout = engine.programs.step_program(engine.plan.buckets[-1]).layout
    assert 8 * 2 * len(bias) > layout.max_patches
    answers = engine.run([*wide, request("plain", PROMPT, 6)])
    for item in wide:
        assert set(answers[item.request_id].token_ids) <= {40, 41}
    assert (
        answers["plain"].token_ids == engine.run([request("plain", PROMPT, 6)])["plain"].token_ids
    )


def test_logits_that_are_not_finite_fail_their_own_request_only(engine: TinyEngine) -> None:
    """Token 95 is poison: its embedding is NaN. Afterwards its blocks serve others unharmed."""
    params = list(engine.params)
    index = engine.model.names.index("embed.weight")
    params[index] = params[index].at[95].set(np.nan)

    core = engine.core(num_blocks=14)
    core.executor = ModelRunner(engine.plan, tuple(params), engine.programs)
    never_95 = {"logit_bias": {95: -100.0}}
    good = [request(f"g{i}", PROMPT[: i + 1], 12, **never_95) for i in range(6)]
    bad = [request(f"b{i}", [1, 2, 95, 4] * (i + 1), 12) for i in range(3)]
    mixed = [good[0], bad[0], *good[1:3], bad[1], *good[3:], bad[2]]
    answers = engine.run(mixed, core)
    for item in bad:
        assert answers[item.request_id].finish_reason == "error"
        assert "not finite" in str(answers[item.request_id].error)
        assert answers[item.request_id].token_ids == []
    after = engine.run([request("after", PROMPT * 8, 12, **never_95)], core)
    for item in good:
        alone = engine.run([item])[item.request_id]
        assert answers[item.request_id].token_ids == alone.token_ids
    alone = engine.run([request("after", PROMPT * 8, 12, **never_95)])["after"]
    assert after["after"].token_ids == alone.token_ids


def test_parameters_that_forbid_every_token_fail_their_own_request_only(
    engine: TinyEngine,
) -> None:
    core = engine.core()
    bad = request("bad", PROMPT, 6, allowed_token_ids=[7], bad_words_token_ids=((7,),))
    good = request("good", PROMPT, 6, allowed_token_ids=[7])
    answers = engine.run([bad, good, request("plain", PROMPT, 6)], core)
    assert answers["bad"].finish_reason == "error" and answers["bad"].token_ids == []
    assert "forbid every token" in str(answers["bad"].error)
    assert answers["good"].token_ids == [7] * 6
    assert len(answers["plain"].token_ids) == 6


def test_a_failing_step_is_survived(engine: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raise in dispatch loses the donated cache; everything is recomputed and comes out the
    same.
    """
    core = engine.core()
    runner = core.executor
    assert isinstance(runner, ModelRunner)
    original, calls = runner.dispatch, []

    def flaky(plan):
        calls.append(plan.step_id)
        if len(calls) == 6:
            jax.tree.map(jax.Array.delete, runner._kv)  # as if the step had consumed it
            raise RuntimeError("device lost")
        return original(plan)

    monkeypatch.setattr(runner, "dispatch", flaky)
    requests = [request(f"r{i}", PROMPT[: i + 2], 10, temperature=1.0, seed=i) for i in range(4)]
    answers = engine.run(requests, core)
    for item in requests:
        assert answers[item.request_id].token_ids == engine.run([item])[item.request_id].token_ids
