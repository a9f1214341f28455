"""Programs lowered by helpers are those that this process would lower (an engine runs them in
test_lowering_cache.py), and a helper that fails costs time only.
"""

import re
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxllm.attention.backend import AttentionTarget
from jaxllm.attention.backends.xla import BACKEND
from jaxllm.runner import lowering_helpers
from jaxllm.runner.lowering_cache import LoweringCache
from jaxllm.runner.lowering_helpers import LoweringHelpers, LoweringTarget, LoweringTask
from jaxllm.runner.lowering_worker import lower
from jaxllm.runner.program_jobs import ProgramJobs
from tests.fakes.tiny_engine import TinyEngine, tiny_plan

CPU = LoweringTarget(AttentionTarget("cpu", "", 16, "float32"), "cpu", "cpu")


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
        shared = helpers.share(tiny_plan(), wanted)
        found = [next(shared)]
        give_up = time.monotonic() + 60
        while told not in caplog.text:  # the caller is slow: helpers have all the time they want
            assert time.monotonic() < give_up
            time.sleep(0.01)
        found += shared
    finally:
        helpers.close()
    assert sorted(name for name, _ in found) == [name for name, _ in wanted]
    helped = {name for name, seconds in found if seconds}
    if code is ANSWERS:  # the caller took one before the helper did, and does what it could not
        assert len(helped) >= 3 and "program 3" not in helped
    else:
        assert not helped
