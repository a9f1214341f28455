"""Programs lowered by helpers are those that this process would lower (an engine runs them in
test_lowering_cache.py), and a helper that fails costs time only.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import msgspec
import pytest

from jaxllm.attention.backend import AttentionTarget
from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.model import AttentionChoice
from jaxllm.config.plan import EnginePlan
from jaxllm.runner import lowering_helpers
from jaxllm.runner.lowering_cache import LoweringCache, jax_settings
from jaxllm.runner.lowering_helpers import Done, LoweringHelpers, LoweringTarget, LoweringTask
from jaxllm.runner.lowering_worker import lower
from jaxllm.runner.program_jobs import ProgramJobs
from tests.fakes.tiny_engine import TinyEngine, tiny_plan

CPU = LoweringTarget(AttentionTarget("cpu", "", 16, "float32"), "cpu", "cpu", jax_settings())


class SlowCaller(LoweringHelpers):
    """Whoever asks begins when a helper has done something."""

    def share(
        self, plan: EnginePlan, wanted: Sequence[tuple[str, Path]], done: Done
    ) -> Iterator[str]:
        self.helped: dict[str, float] = {}
        give_up = time.monotonic() + 120

        def note(name: str, seconds: float) -> None:
            self.helped[name] = seconds
            done(name, seconds)

        for name in super().share(plan, wanted, note):
            while not self.helped:
                assert time.monotonic() < give_up
                time.sleep(0.01)
            yield name


def text_of(path: Path) -> str:
    """Without what says where in the source it comes from."""
    text = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
    lines = [line for line in text.splitlines() if not line.startswith("#loc")]
    return re.sub(r"loc\([^)]*\)", "", "\n".join(lines))


def test_a_helper_writes_what_this_process_would_write(engine: TinyEngine, tmp_path: Path) -> None:
    jobs = ProgramJobs(engine.plan, engine.model, BACKEND, "cpu").jobs()
    for job in (jobs[0], jobs[-1]):
        answer = lower(LoweringTask(CPU, engine.plan, job.name, str(tmp_path / job.name)))
        assert answer.error is None and answer.seconds > 0
        cache = LoweringCache(tmp_path / "own")
        cache.lower(job.name, job.function, job.args, job.donated)
        path = cache.path(job.name, job.args)
        assert path is not None and text_of(tmp_path / job.name) == text_of(path)
    assert "KeyError" in str(lower(LoweringTask(CPU, engine.plan, "none", "")).error)


def test_a_plan_is_the_same_to_a_helper() -> None:
    choice = AttentionChoice("alibi", (("slopes", (1.0, 2.0)),))
    plan = tiny_plan()
    plan = replace(plan, model=replace(plan.model, attention=(choice,)))
    task = LoweringTask(CPU, plan, "x", "y")
    told = msgspec.json.decode(msgspec.json.encode(task), type=LoweringTask)
    assert told == task and hash((told.plan, told.target)) == hash((task.plan, task.target))


ANSWERS = """
import sys
for line in sys.stdin:
    if '"program 3"' in line:
        print('{"seconds": 0, "error": "cannot"}', flush=True)
    else:
        print('{"seconds": 0.5}', flush=True)
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (ANSWERS, "cannot"),
        ("raise SystemExit", "could not lower"),
        ("print('nonsense', flush=True); input()", "could not lower"),
        (None, "by 0 helpers"),
    ],
    ids=["one task fails", "dies", "nonsense", "does not start"],
)
def test_every_program_comes_once_whatever_helpers_do(
    code: str | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    command = ("/no/such/python",) if code is None else (sys.executable, "-c", code)
    monkeypatch.setattr(lowering_helpers, "COMMAND", command)
    helpers = LoweringHelpers(CPU, 1)
    wanted = [(f"program {i}", tmp_path / str(i)) for i in range(5)]
    try:
        helped: dict[str, float] = {}
        shared = helpers.share(tiny_plan(), wanted, helped.__setitem__)
        own = [next(shared)]
        give_up = time.monotonic() + 60
        while told not in caplog.text:  # the caller is slow: helpers have all the time they want
            assert time.monotonic() < give_up
            time.sleep(0.01)
        own += shared
    finally:
        helpers.close()
    assert sorted([*own, *helped]) == [name for name, _ in wanted]
    assert set(helped.values()) == ({0.5, 0.0} if code is ANSWERS else {0.0} if code else set())
    assert code is not ANSWERS or helped["program 3"] == 0.0


def test_a_helper_that_hangs_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    sleeping = (sys.executable, "-c", "import time; time.sleep(600)")
    monkeypatch.setattr(lowering_helpers, "COMMAND", sleeping)
    monkeypatch.setattr(lowering_helpers, "PATIENCE_S", 0.1)
    helpers, helped = LoweringHelpers(CPU, 1), dict[str, float]()
    own: list[str] = []
    for name in helpers.share(
        tiny_plan(), [(f"{i}", tmp_path) for i in range(5)], helped.__setitem__
    ):
        own.append(name)
        time.sleep(0.1)  # in which the helper is given one
    helpers.close()
    assert sorted([*own, *helped]) == ["0", "1", "2", "3", "4"]
    assert list(helped.values()) == [0.0] and "could not lower" in caplog.text
