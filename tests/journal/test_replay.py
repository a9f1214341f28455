"""A journal is replayed exactly, whatever happened to the engine that wrote it."""

import dataclasses
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.errors import ConfigError
from jaxllm.journal import core as journal_core
from jaxllm.journal.batch import view_step
from jaxllm.journal.core import JournaledCore
from jaxllm.journal.file import JournalError, JournalWriter, read_journal
from jaxllm.journal.records import Added, Decided, Full, Header
from jaxllm.journal.replay import replay
from jaxllm.simulation import simulation
from jaxllm.simulation.checked import CheckedCore
from jaxllm.simulation.fake_executor import FakeExecutor
from jaxllm.simulation.oracle import run_alone
from jaxllm.simulation.simulation import Simulation
from server.cli import main
from tests.fakes.plans import VOCAB_SIZE, make_plan, make_request

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, logger="jaxllm.engine.engine_core")


class JournaledChecked(JournaledCore, CheckedCore):
    """The simulation's engine core, writing."""


def record(
    patch: pytest.MonkeyPatch, path: Path, scenario: str, seed: int, max_bytes: int = 2**30
) -> Simulation:
    """Play a scenario with a journal."""

    def make(scheduler: Any, executor: Any, **options: Any) -> CheckedCore:
        header = Header(scheduler.plan, options["async_scheduling"], scheduler.scheduling)
        journal = JournalWriter(path, header, max_bytes)
        return JournaledChecked(scheduler, executor, journal=journal, **options)

    patch.setattr(simulation, "CheckedCore", make)
    played = Simulation(scenario, seed)
    played.run(300)
    return played


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scenario", ["random", "pressure", "faults", "nan-rows", "cancels"])
def test_every_decision_is_made_again(
    scenario: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    played = record(monkeypatch, tmp_path / "j", scenario, seed)
    result = replay(tmp_path / "j")
    assert result.difference is result.error is None
    assert result.num_steps == played.scheduler.num_steps > 50
    assert result.num_requests >= played.num_ended > 10
    assert not result.unfinished
    assert (result.num_failures > 0) == (played.executor.num_resets > 0)


def test_a_scheduler_that_decides_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record(monkeypatch, tmp_path / "j", "random", 1)
    assert main(["replay", str(tmp_path / "j")]) == 0
    assert "Every decision is the same." in capsys.readouterr().out
    from jaxllm.core.block_pool import BlockPool

    allocate = BlockPool.allocate

    def from_the_other_end(self: BlockPool, n: int) -> list[int] | None:
        if self.num_free < self.num_usable // 2:
            self._blank.reverse()
        return allocate(self, n)

    monkeypatch.setattr(BlockPool, "allocate", from_the_other_end)
    result = replay(tmp_path / "j")
    assert result.difference is not None and result.difference.then is not None
    assert main(["replay", str(tmp_path / "j")]) == 1
    told = capsys.readouterr().out
    assert f"differs is step {result.difference.then.step_id}" in told
    assert "new_blocks" in told and "starts " not in told


def test_a_journal_cut_anywhere_is_replayed_up_to_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record(monkeypatch, tmp_path / "j", "faults", 2)
    whole = (tmp_path / "j").read_bytes()
    lengths = range(2000, len(whole), len(whole) // 20)
    steps = []
    for length in lengths:
        (tmp_path / "cut").write_bytes(whole[:length])
        result = replay(tmp_path / "cut")
        assert result.difference is result.error is None
        steps.append(result.num_steps)
    assert steps == sorted(steps) and steps[-1] > steps[0]


def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(monkeypatch, tmp_path / "j", "random", 2)
    data = bytearray((tmp_path / "j").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(JournalError):
        replay(tmp_path / "j")


def test_what_the_scheduler_died_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(monkeypatch, tmp_path / "j", "random", 1)
    from jaxllm.core.kv_cache_manager import KVCacheManager

    monkeypatch.setattr(KVCacheManager, "num_blocks_for", lambda self, n: 10_000)
    result = replay(tmp_path / "j")
    assert result.error is not None and "InvalidRequestError" in result.error


@pytest.mark.parametrize("scenario", ["pressure", "faults"])
def test_a_step_is_shown_as_it_was(
    scenario: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    played = record(monkeypatch, tmp_path / "j", scenario, 1)
    requests = [r.request for r in read_journal(tmp_path / "j") if isinstance(r, Added)]
    alone = {
        r.request_id: (*r.prompt_token_ids, *run_alone(r, VOCAB_SIZE).token_ids) for r in requests
    }
    for step_id in range(0, played.scheduler.num_steps, 5):
        view = view_step(tmp_path / "j", step_id)
        failed = view.ended.startswith("failed") and scenario == "faults"
        assert view.ended == "fetched" or failed
        for row in view.rows if not failed else ():
            end = row.start + len(row.token_ids)
            assert row.token_ids == alone[row.request_id][row.start : end]
            after = alone[row.request_id][end : end + 1]  # none, after the last token
            assert not (row.samples and row.finite) or after in ((), (row.sampled,))
            assert len(row.table) >= -(-end // played.plan.block_size) and 0 not in row.table
    assert main(["replay", str(tmp_path / "j"), "--step", "5"]) == 0
    shown = capsys.readouterr().out
    assert all(row.request_id in shown for row in view_step(tmp_path / "j", 5).rows)
    assert main(["replay", str(tmp_path / "j"), "--step", "100000"]) == 2


def test_every_field_of_a_decision_is_recorded():
    """What is added to SchedulerOutput belongs into Decided: else a replay does not see it."""
    fields = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert fields - {"request_ids"} == set(Decided.__struct_fields__) - {"time", "token_limit"}


@pytest.mark.parametrize("max_bytes", range(20_000, 21_000, 170))  # in the middle of turns, too
def test_a_full_journal_says_so_and_the_engine_runs_on(
    max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    played = record(monkeypatch, tmp_path / "j", "random", 1, max_bytes)
    assert (tmp_path / "j").stat().st_size <= max_bytes
    assert isinstance(list(read_journal(tmp_path / "j"))[-1], Full)
    result = replay(tmp_path / "j")
    assert result.full and result.difference is None
    assert 10 < result.num_steps < played.scheduler.num_steps


def test_only_its_owner_reads_it_and_earlier_ones_are_kept(tmp_path: Path):
    header = Header(make_plan(), True)
    for _ in range(6):
        JournalWriter(tmp_path / "j", header, 2**20).close()
    assert {path.name for path in tmp_path.iterdir()} == {"j", "j.1", "j.2", "j.3"}
    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o600


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    header = Header(make_plan(), True)
    with pytest.raises(ConfigError, match="--journal"):
        JournalWriter(tmp_path / "none" / "j", header, 2**20)
    with pytest.raises(ConfigError, match=r"--journal-max-bytes is 100: .* Give it more"):
        JournalWriter(tmp_path / "j", header, 100)
    assert not (tmp_path / "j").exists()


def test_a_disk_that_is_full_ends_the_recording_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.ERROR, logger="jaxllm.journal.file")
    writer = JournalWriter(tmp_path / "j", Header(make_plan(), True), 2**20)
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        writer.write(Full(1.0))
    assert not writer.open
    assert "ends here" in caplog.text
    assert len(list(read_journal(tmp_path / "j"))) == 1


def test_an_engine_that_ends_closes_its_journal(tmp_path: Path):
    plan = make_plan()
    journal = JournalWriter(tmp_path / "j", Header(plan, True), 2**20)
    JournaledCore(Scheduler(plan), FakeExecutor(plan), journal=journal).close()
    assert not journal.open


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "j").write_text("{}")
    assert main(["replay", str(tmp_path / "j")]) == 2
    assert "not a journal" in capsys.readouterr().err


ENDLESS = """
import sys
from pathlib import Path
from jaxllm.core.scheduler import Scheduler
from jaxllm.journal.core import JournaledCore, open_journal
from jaxllm.simulation.fake_executor import FakeExecutor
from tests.fakes.plans import VOCAB_SIZE, make_plan, make_request

plan = make_plan()
journal = open_journal(Path(sys.argv[1]), 2**30, plan, "hash", async_scheduling=True)
core = JournaledCore(Scheduler(plan), FakeExecutor(plan), journal=journal)
number = 0
while True:
    if len(core.scheduler.requests) < 6:
        core.add_request(make_request(f"r{number}", 5, 30))
        number += 1
    core.step()
"""


def test_the_journal_of_a_killed_engine(tmp_path: Path):
    path = tmp_path / "j"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 100_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = replay(path)
    assert result.difference is result.error is None
    assert result.num_steps > 100 and result.unfinished
    view = view_step(path, result.num_steps - 1)  # the step it died of
    assert view.rows


def test_the_header_names_model_and_version(tmp_path: Path):
    journal_core.open_journal(tmp_path / "j", 2**20, make_plan(), "m", async_scheduling=False)
    header = replay(tmp_path / "j").header
    assert (header.model, header.plan, header.async_scheduling) == ("m", make_plan(), False)
    assert header.jaxllm and make_request()
