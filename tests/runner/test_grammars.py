"""Grammars through the real engine: company, preemption and failed steps change no answer."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from threading import Event, Semaphore, get_ident
from time import sleep
from typing import Any

import jax
import msgspec
import pytest

from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.grammar import compiler as module
from jaxllm.grammar.matcher import PARALLEL_FROM
from jaxllm.messages import EngineCoreRequest, Thoughts
from jaxllm.runner import masking, model_runner
from jaxllm.runner.masking import MaskedStep
from jaxllm.runner.model_runner import ModelRunner, StepHandle
from tests.fakes.ascii_tokenizer import EOS, ids_of, regex, text_of
from tests.fakes.tiny_engine import Answer, TinyEngine, request

PATTERNS = ("[a-z]{2,9}", "(yes|no)(, (yes|no)){1,3}", "x{0,200}", "[0-9]{3}-[0-9]{4}", "(ab|cd)+")


def constrained(count: int, **params: Any) -> list[EngineCoreRequest]:
    settings = {"temperature": 1.0, "eos_token_ids": (EOS,)} | params
    return [
        request(
            f"g{i}", [i % 90 + 1] * (1 + i % 40), 40, seed=i,
            grammar=regex(PATTERNS[i % len(PATTERNS)]), **settings,
        )
        for i in range(count)
    ]  # fmt: skip


def plain(count: int) -> list[EngineCoreRequest]:
    return [
        request(f"p{i}", [i + 3] * (1 + i % 50), 30, seed=i, temperature=i % 3 / 2.0, top_k=i % 4)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def answers(engine: TinyEngine) -> dict[str, Answer]:
    return engine.run(constrained(20))


def test_every_answer_follows_its_grammar(answers: dict[str, Answer]) -> None:
    whole = 0
    for number, answer in enumerate(answers.values()):
        pattern, text = PATTERNS[number % len(PATTERNS)], text_of(answer.token_ids)
        assert answer.error is None
        assert (answer.finish_reason == "stop") == (answer.token_ids[-1] == EOS)
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, text), (pattern, text)
            whole += 1
        else:
            assert answer.finish_reason == "length" and len(answer.token_ids) == 40
    assert 10 < whole < 20


def test_rows_without_a_grammar_draw_the_same_beside_rows_with_one(
    engine: TinyEngine, answers: dict[str, Answer]
) -> None:
    alone = engine.run(plain(12))
    mixed = engine.run([r for pair in zip(plain(12), constrained(12), strict=True) for r in pair])
    for name, answer in alone.items():
        assert mixed[name] == answer
    for name, answer in answers.items():
        assert name not in mixed or mixed[name] == answer


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["ahead", "in step"])
def test_preemption_changes_nothing(
    engine: TinyEngine, answers: dict[str, Answer], async_scheduling: bool
) -> None:
    core = engine.core(async_scheduling=async_scheduling, num_blocks=8)
    assert engine.run(constrained(20), core) == answers
    assert core.stats().num_preemptions > 0


class Failing:
    """A runner some of whose steps fail."""

    def __init__(self, runner: ModelRunner, fail_at: tuple[int, ...]):
        self._runner, self._fail_at = runner, fail_at
        self.num_fetched = self.num_resets = 0

    def dispatch(self, plan: SchedulerOutput) -> StepHandle:
        return self._runner.dispatch(plan)

    def fetch(self, handle: StepHandle) -> ModelRunnerOutput:
        self.num_fetched += 1
        output = self._runner.fetch(handle)
        if self.num_fetched in self._fail_at:
            raise RuntimeError("injected")
        return output

    def reset(self) -> None:
        self.num_resets += 1
        self._runner.reset()


def test_failed_steps_change_nothing(engine: TinyEngine, answers: dict[str, Answer]) -> None:
    core = engine.core()
    failing = Failing(engine.runner(), (4, 30, 31))
    core.executor = failing
    assert engine.run(constrained(20), core) == answers
    assert failing.num_resets == 3


def test_a_failed_dispatch_changes_nothing(
    engine: TinyEngine, answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails while masks are being filled for it."""
    core, calls = engine.core(), count()
    runner = core.executor
    assert isinstance(runner, ModelRunner)
    forward = runner._forward

    def failing(*args: Any) -> Any:
        if next(calls) in (5, 15):
            raise RuntimeError("injected")
        return forward(*args)

    monkeypatch.setattr(runner, "_forward", failing)
    some = constrained(6)
    assert engine.run(some, core) == {one.request_id: answers[one.request_id] for one in some}


def test_the_next_step_is_packed_while_masks_are_filled(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, here, length = engine.core(), get_ident(), 12
    runner = core.executor
    assert isinstance(runner, ModelRunner)
    fill, pack = runner._masking.fill, model_runner.pack
    packed, beside = Semaphore(0), list[bool]()

    def watched(step: MaskedStep, *begun: Any) -> Any:
        masks = fill(step, *begun)
        beside.append(get_ident() != here)
        # The first two steps are packed before any masks are filled beside; none follows the last.
        for _ in range({1: 0, 2: 3, length: 0}.get(len(beside), 1)):
            assert packed.acquire(timeout=20)
        return masks

    def packing(*args: Any) -> Any:
        packed.release()
        return pack(*args)

    monkeypatch.setattr(runner._masking, "fill", watched)
    monkeypatch.setattr(model_runner, "pack", packing)
    settings = {"grammar": regex("[a-z]{40}"), "eos_token_ids": (EOS,)}
    engine.run([request(f"g{i}", [1], length, **settings) for i in range(PARALLEL_FROM)], core)
    assert beside == [False] + [True] * (length - 1)


def test_grammars_leave_a_thread_that_dispatches_alone(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have to wait for Python's lock."""
    core, length = engine.core(), 12
    runner = core.executor
    assert isinstance(runner, ModelRunner)
    follow, forward = runner._masking.follow, runner._forward
    dispatching, left_alone = Event(), list[bool]()

    def watched(*args: Any) -> Any:
        left_alone.append(not dispatching.is_set())
        return follow(*args)

    def slow(*args: Any) -> Any:
        dispatching.set()
        if (last := runner._last) is not None and last.out is not None:
            jax.block_until_ready(last.out)
            sleep(0.01)
        try:
            return forward(*args)
        finally:
            dispatching.clear()

    monkeypatch.setattr(runner._masking, "follow", watched)
    monkeypatch.setattr(runner, "_forward", slow)
    settings = {"grammar": regex("[a-z]{40}"), "eos_token_ids": (EOS,)}
    engine.run([request(f"g{i}", [1], length, **settings) for i in range(PARALLEL_FROM)], core)
    assert left_alone == [True] * length


def test_other_parameters_still_hold(engine: TinyEngine) -> None:
    params = {"bad_words_token_ids": tuple((i,) for i in range(65, 81)), "logprobs": 2}
    for name, answer in engine.run(constrained(5, **params)).items():
        assert len(answer.logprobs) == len(answer.token_ids), name
        assert not set(answer.token_ids) & set(range(65, 81))


FORCING = (
    r'\{"customer_name": "[a-z]{1,3}", "shipping_address": [0-9]{2}\}',
    "(yes, that is so|no, that is not so)",
    "[ab]{3} and then there is a rest that is longer than any answer may be",
)
THOUGHTS = Thoughts(
    "<a>", ("</a>",), tuple(ids_of("<a>")), tuple(ids_of("</a>  ")), tuple(ids_of("  ")), budget=5
)


def forcing(**params: Any) -> list[EngineCoreRequest]:
    """Some think first, and are ended; some end in the middle of forced text."""
    grammars = [regex(pattern) for pattern in FORCING]
    thinking = (None, THOUGHTS, msgspec.structs.replace(THOUGHTS, begun=True))
    settings = {"temperature": 1.0, "eos_token_ids": (EOS,)} | params
    return [
        request(
            f"f{i}", [i % 90 + 1] * (1 + 3 * i), 47 + i, seed=i, presence_penalty=float(i % 2),
            grammar=("", *grammars)[i % 4], thoughts=thinking[i % 3], **settings,
        )
        for i in range(12)
    ]  # fmt: skip


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of forced tokens is worth a step."""
    monkeypatch.setitem(masking.MIXED_COST, "cpu", 0.0)
    monkeypatch.setattr(masking, "LEAST_FORCED", 1)


@pytest.fixture(scope="module")
def drawn(engine: TinyEngine) -> dict[str, Answer]:
    """Every token of every answer."""
    core = engine.core()
    core.executor = engine.runner(replace(engine.plan, jump_forward=False))
    return engine.run(forcing(), core)


@pytest.mark.usefixtures("eager")
def test_forced_text_is_what_would_have_been_drawn(
    engine: TinyEngine, drawn: dict[str, Answer]
) -> None:
    """Here there is one way to spell a text."""
    whole = 0
    for i, (name, answer) in enumerate(drawn.items()):
        text = text_of(answer.token_ids)
        if thought := i % 3 == 2 or (i % 3 == 1 and text.startswith("<a>")):
            thoughts, closing, text = text.partition("</a>")
            assert len(thoughts.removeprefix("<a>")) <= 5, name
            assert closing or not i % 4, name  # without a grammar an answer may end there
        if i % 4 and answer.finish_reason == "stop":
            text = text.removeprefix("  ") if thought else text
            assert re.fullmatch(FORCING[i % 4 - 1], text), text
            whole += 1
    assert whole > 3
    assert engine.run([*forcing(), *plain(4)]) == drawn | engine.run(plain(4))


def test_where_mixed_steps_are_dear_only_long_runs_jump(
    engine: TinyEngine, drawn: dict[str, Answer]
) -> None:
    core = engine.core()
    assert engine.run(forcing(), core) == drawn
    assert core.stats().num_steps > 40


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["ahead", "in step"])
def test_forced_text_saves_steps_and_survives_preemption(
    engine: TinyEngine, drawn: dict[str, Answer], async_scheduling: bool
) -> None:
    core = engine.core(async_scheduling=async_scheduling, num_blocks=9)
    assert engine.run(forcing(), core) == drawn
    assert core.stats().num_preemptions > 0
    alone = forcing()[1]
    core = engine.core(async_scheduling=async_scheduling)
    answer = engine.run([alone], core)[alone.request_id]
    assert answer == drawn[alone.request_id]
    assert core.stats().num_steps < len(answer.token_ids) / 2


@pytest.mark.usefixtures("eager")
def test_forced_text_survives_failed_steps(engine: TinyEngine, drawn: dict[str, Answer]) -> None:
    core = engine.core()
    core.executor = Failing(engine.runner(), (3, 20))
    assert engine.run(forcing(), core) == drawn


def test_scored_tokens_are_all_drawn(engine: TinyEngine, drawn: dict[str, Answer]) -> None:
    for name, answer in engine.run(forcing(logprobs=0)).items():
        assert len(answer.logprobs) == len(answer.token_ids)
        assert answer.token_ids == drawn[name].token_ids


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "LIMITS", module.LLParserLimits(max_lexer_states=20))
    yield


@pytest.mark.usefixtures("few_states")
def test_a_grammar_that_gives_up_fails_alone(engine: TinyEngine) -> None:
    alone = engine.run(plain(4))
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 1, "eos_token_ids": (EOS,)}
    hopeless = request("g", [1], 60, grammar=regex("(a|b)*a(a|b){30}"), **settings)
    got = engine.run([*plain(4), hopeless])
    failed = got.pop("g")
    assert failed.finish_reason == "error" and "structured_outputs" in str(failed.error)
    assert got == alone
