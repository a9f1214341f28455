"""The engine process: deaths, restarts, ends, and the worker as seen by a parent."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError, JaxLLMError, OutOfMemoryError
from jaxllm.frontend.process_client import EngineProcess
from jaxllm.frontend.worker_process import WorkerProcess
from jaxllm.ipc import SyncChannel
from jaxllm.messages import EngineCoreRequest, StepOutputs
from jaxllm.sampling_params import SamplingParams
from tests.frontend.fake_worker import BLOCKING

pytestmark = pytest.mark.alone

Settings = Callable[..., dict[str, Any]]
WORKER = "tests.frontend.fake_worker"


class Recorder:
    def __init__(self, fake_worker: str, settings: dict[str, Any]):
        self.steps: list[StepOutputs] = []
        self.deaths: list[str] = []
        self.process = EngineProcess(
            EngineConfig(**settings),
            on_outputs=self.steps.append,
            on_death=lambda error: self.deaths.append(error.message),
            worker_module=fake_worker,
        )

    async def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


def request(max_tokens: int = 3) -> EngineCoreRequest:
    return EngineCoreRequest("r", (1, 2), SamplingParams(seed=0), max_tokens)


def children() -> list[psutil.Process]:
    """Workers that were left, dead ones that nobody waited for among them."""

    def is_left(child: psutil.Process) -> bool:
        return child.status() == psutil.STATUS_ZOMBIE or WORKER in child.cmdline()

    return list(filter(is_left, psutil.Process().children()))


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("too-large", OutOfMemoryError, "80 GiB"),
        ("mute", EngineDeadError, "exit code 3"),
        ("bug", JaxLLMError, "broken wiring"),
    ],
)
def test_failed_start_is_a_typed_error(
    fake_worker: str, settings: Settings, model: str, kind: type[JaxLLMError], words: str
) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings(model))
        with pytest.raises(kind, match=words) as caught:
            await recorder.process.start()
        assert type(caught.value) is kind
        assert not recorder.process.ready and not recorder.deaths
        with pytest.raises(EngineDeadError):
            recorder.process.send(request())
        await recorder.process.stop()

    asyncio.run(main())
    assert not children()


def test_gives_up_after_three_deaths(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings())
        process = recorder.process
        await process.start()
        for death in (1, 2, 3):
            await recorder.until(lambda: process.ready)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            await recorder.until(lambda death=death: len(recorder.deaths) == death)
        assert process.gave_up and "stays down" in recorder.deaths[-1]
        await asyncio.sleep(0.2)
        assert not process.ready and process.generation == 3
        with pytest.raises(EngineDeadError, match=r"SIGKILL.*stays down"):
            process.send(request())
        await process.stop()

    asyncio.run(main())
    assert not children()


def test_restart_that_fails_counts_as_a_death(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings("once"))
        await recorder.process.start()
        assert recorder.process.pid is not None
        os.kill(recorder.process.pid, signal.SIGKILL)
        await recorder.until(lambda: recorder.process.gave_up)
        assert len(recorder.deaths) == 3 and "did not come up again" in recorder.deaths[-1]
        assert "exit code 3" in await recorder.process.given_up()
        await recorder.process.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("model", "words"), [("garbage", "limit"), ("raises", "exit code 1")])
def test_engine_that_talks_nonsense_or_crashes_is_replaced(
    fake_worker: str, settings: Settings, model: str, words: str
) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings(model))
        process = recorder.process
        await process.start()
        process.send(request())
        await recorder.until(lambda: bool(recorder.deaths))
        assert words in recorder.deaths[0]
        await recorder.until(lambda: process.ready)
        assert process.generation == 2
        await process.stop()

    asyncio.run(main())
    assert not children()


def test_stop_is_clean_even_while_starting(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings("slow"))
        start = asyncio.create_task(recorder.process.start())
        await asyncio.sleep(0.4)
        start.cancel()
        begin = time.monotonic()
        await asyncio.gather(start, return_exceptions=True)
        assert start.cancelled() and time.monotonic() - begin < 10.0

        recorder = Recorder(fake_worker, settings())
        await recorder.process.start()
        recorder.process.send(request(max_tokens=1_000_000))
        await recorder.until(lambda: len(recorder.steps) > 2)
        begin = time.monotonic()
        await recorder.process.stop()
        assert time.monotonic() - begin < 5.0
        assert not recorder.deaths

    asyncio.run(main())
    assert not children()


def test_a_failing_callback_does_not_leave_a_deaf_frontend(
    fake_worker: str, settings: Settings
) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings())
        process = recorder.process
        recorder.process._on_outputs = lambda step: 1 // 0  # type: ignore[assignment]
        await process.start()
        process.send(request())
        await recorder.until(lambda: bool(recorder.deaths))
        await recorder.until(lambda: process.ready and process.generation == 2)
        await process.stop()

    asyncio.run(main())


@pytest.mark.parametrize("busy", [True, False])
def test_a_stopped_engine_is_found_and_replaced(
    fake_worker: str, settings: Settings, busy: bool
) -> None:
    """Its requests are told before it is killed, and within the timeout and a little."""

    async def main() -> None:
        recorder = Recorder(fake_worker, settings(step_timeout=0.5))
        process = recorder.process
        await process.start()
        if busy:
            process.send(request(max_tokens=1_000_000))
            await recorder.until(lambda: len(recorder.steps) > 2)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        await recorder.until(lambda: process.unready_because is not None)
        assert "no progress" in (process.unready_because or "") and process.ready
        await recorder.until(lambda: bool(recorder.deaths))
        assert 0.4 < time.monotonic() - stopped < 0.5 + 10.0
        assert "no progress for 0.5 s" in recorder.deaths[0]
        await recorder.until(lambda: process.ready)
        assert process.generation == 2 and process.unready_because is None
        await process.stop()

    asyncio.run(main())
    assert not children()


@pytest.mark.parametrize("model", ["fake", "spins"])
def test_an_engine_that_gets_nothing_done_is_replaced(
    fake_worker: str, settings: Settings, model: str
) -> None:
    """Its step does not come back; or its loop turns and makes no step."""

    async def main() -> None:
        recorder = Recorder(fake_worker, settings(model, step_timeout=0.5))
        await recorder.process.start()
        blocking = EngineCoreRequest("r", (BLOCKING,), SamplingParams(seed=0), 3)
        recorder.process.send(blocking)
        await recorder.until(lambda: bool(recorder.deaths))
        assert "no progress" in recorder.deaths[0]
        await recorder.until(lambda: recorder.process.ready)
        await recorder.process.stop()

    asyncio.run(main())


def test_an_idle_engine_and_a_long_start_are_left_in_peace(
    fake_worker: str, settings: Settings
) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings("late", step_timeout=0.6))
        process = recorder.process
        await process.start()  # takes longer than the timeout
        for _ in range(20):
            await asyncio.sleep(0.05)
            assert process.unready_because is None
        assert process.generation == 1 and not recorder.deaths
        process.send(request())
        await recorder.until(lambda: len(recorder.steps) == 3)
        await process.stop()

    asyncio.run(main())


def test_says_when_to_come_again(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings("late"))
        await recorder.process.start()
        assert recorder.process.pid is not None
        os.kill(recorder.process.pid, signal.SIGKILL)
        await recorder.until(lambda: not recorder.process.ready)
        with pytest.raises(EngineDeadError) as caught:
            recorder.process.send(request())
        assert 5.0 <= (caught.value.retry_after_s or 0.0) <= 60.0
        await recorder.process.stop()

    asyncio.run(main())


def test_giving_up_can_be_waited_for(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings("once"))
        await recorder.process.start()
        assert recorder.process.pid is not None
        os.kill(recorder.process.pid, signal.SIGKILL)
        reason = await asyncio.wait_for(recorder.process.given_up(), 30)
        assert "stays down" in reason and "stays down" in (recorder.process.unready_because or "")
        await recorder.process.stop()

    asyncio.run(main())


def test_a_supervisor_that_fails_does_not_leave_a_server_that_only_looks_alive(
    fake_worker: str, settings: Settings
) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings())
        process = recorder.process
        await process.start()
        process._launch = lambda: 1 // 0  # type: ignore[assignment]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        reason = await asyncio.wait_for(process.given_up(), 30)
        assert "not watched any more" in reason and not process.ready
        await process.stop()

    asyncio.run(main())


def test_a_start_that_fails_for_want_of_files_is_tried_again(
    fake_worker: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says of which; clients need not know what files there are."""

    async def main() -> None:
        recorder = Recorder(fake_worker, settings())
        process = recorder.process
        await process.start()
        spawn, failures = WorkerProcess.spawn, [OSError(24, "Too many open files", "/secret")]

        async def spawn_later(module: str, generation: int) -> WorkerProcess:
            if failures:
                raise failures.pop()
            return await spawn(module, generation)

        monkeypatch.setattr(WorkerProcess, "spawn", spawn_later)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await recorder.until(lambda: len(recorder.deaths) == 2)
        assert recorder.deaths[1] == "The engine did not come up again. It is being restarted."
        assert "Too many open files: '/secret'" in caplog.text
        await recorder.until(lambda: process.ready)
        assert process.generation == 3
        await process.stop()

    asyncio.run(main())


# uvloop forks where asyncio spawns; the child only executes another program.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_runs_on_uvloop_too(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        recorder = Recorder(fake_worker, settings())
        await recorder.process.start()
        recorder.process.send(request())
        await recorder.until(lambda: len(recorder.steps) == 3)
        await recorder.process.stop()

    asyncio.run(main(), loop_factory=uvloop.new_event_loop)
    assert not children()


def start_worker(fake_worker: str, config: EngineConfig) -> tuple[subprocess.Popen[bytes], Any]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", fake_worker, "--fd", str(theirs.fileno()), "--generation", "1"]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), cwd=Path(__file__).parents[2])
    theirs.close()
    channel = SyncChannel(ours, 1)
    channel.send(config)
    return process, (ours, channel)


@pytest.mark.parametrize("model", ["fake", "slow"])
def test_worker_ends_with_its_parent(fake_worker: str, settings: Settings, model: str) -> None:
    process, (sock, _) = start_worker(fake_worker, EngineConfig(**settings(model)))
    time.sleep(0.3)
    sock.close()
    assert process.wait(20) == 0


def test_worker_survives_ctrl_c_and_refuses_garbage(fake_worker: str, settings: Settings) -> None:
    process, (sock, channel) = start_worker(fake_worker, EngineConfig(**settings()))
    header = sock.recv(8, socket.MSG_WAITALL)
    sock.recv(int.from_bytes(header[:4], "big"), socket.MSG_WAITALL)  # EngineReady
    process.send_signal(signal.SIGINT)
    channel.send(request())
    assert sock.recv(8, socket.MSG_WAITALL)  # it still answers
    sock.sendall(b"\x00\x00\x00\x02\x00\x00\x00\x01\xc1\xc1")
    assert process.wait(20) == 1
    sock.close()
