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

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError, JaxLLMError, OutOfMemoryError
from jaxllm.frontend.process_client import EngineProcess
from jaxllm.ipc import SyncChannel
from jaxllm.messages import EngineCoreRequest, StepOutputs
from jaxllm.sampling_params import SamplingParams

Settings = Callable[..., dict[str, Any]]


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

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


def request(max_tokens: int = 3) -> EngineCoreRequest:
    return EngineCoreRequest("r", (1, 2), SamplingParams(seed=0), max_tokens)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


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
            await recorder.until(lambda death=death: len(recorder.deaths) == death, seconds=1.0)
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
        assert len(recorder.deaths) == 3 and "exit code 3" in recorder.deaths[-1]
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
        assert start.cancelled() and time.monotonic() - begin < 2.0

        recorder = Recorder(fake_worker, settings())
        await recorder.process.start()
        recorder.process.send(request(max_tokens=1_000_000))
        await recorder.until(lambda: len(recorder.steps) > 2)
        begin = time.monotonic()
        await recorder.process.stop()
        assert time.monotonic() - begin < 1.0
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
    assert process.wait(2.0) == 0


def test_worker_survives_ctrl_c_and_refuses_garbage(fake_worker: str, settings: Settings) -> None:
    process, (sock, channel) = start_worker(fake_worker, EngineConfig(**settings()))
    header = sock.recv(8, socket.MSG_WAITALL)
    sock.recv(int.from_bytes(header[:4], "big"), socket.MSG_WAITALL)  # EngineReady
    process.send_signal(signal.SIGINT)
    channel.send(request())
    assert sock.recv(8, socket.MSG_WAITALL)  # it still answers
    sock.sendall(b"\x00\x00\x00\x02\x00\x00\x00\x01\xc1\xc1")
    assert process.wait(2.0) == 1
    sock.close()
