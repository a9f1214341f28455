"""The engine process, seen from the HTTP process: starts it, talks to it, notices its death.

Knows frames and processes; knows nothing of requests beyond handing their outputs on.
"""

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

import jaxllm.errors
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError, JaxLLMError
from jaxllm.ipc import AsyncChannel, FrameError, IPCError
from jaxllm.messages import (
    EngineFailed,
    EngineReady,
    EngineStats,
    ModelInfo,
    Shutdown,
    StepOutputs,
    ToEngine,
)

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
DEATH_WINDOW_S = 60.0
STOP_GRACE_S = 5.0  # after the Shutdown message
TERMINATE_GRACE_S = 2.0  # after SIGTERM


class EngineProcess:
    """One engine process at a time; a dead one is replaced by the next generation.

    ``on_outputs`` gets every step's results. ``on_death`` is called once per death, at once, so
    that waiting requests can be told. Both run on the event loop and must not block.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_outputs: Callable[[StepOutputs], None],
        on_death: Callable[[EngineDeadError], None],
        worker_module: str = "jaxllm.worker",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config = config
        self._on_outputs = on_outputs
        self._on_death = on_death
        self._worker_module = worker_module
        self._clock = clock
        self._generation = 0
        self._process: asyncio.subprocess.Process | None = None
        self._channel: AsyncChannel | None = None  # set while the engine is ready
        self._supervisor: asyncio.Task[None] | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self.down_because = "The engine has not been started."
        self._info: ModelInfo | None = None
        self.gave_up = False  # too many deaths: only stop() is left
        self.stats: EngineStats | None = None
        self.summary: dict[str, str | int | float] = {}

    @property
    def ready(self) -> bool:
        return self._channel is not None

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def info(self) -> ModelInfo:
        """Of the model being served. Raises EngineDeadError before the first start."""
        if self._info is None:
            raise EngineDeadError(self.down_because)
        return self._info

    async def start(self) -> ModelInfo:
        """Start the first engine and wait until it is ready; this may take minutes.

        Raises:
            ConfigError, OutOfMemoryError, ...: the engine said why it cannot start.
            EngineDeadError: it died without a word.
        """
        try:
            channel = await self._launch()
        except BaseException:
            await self._end_process(0.0)
            raise
        self._supervisor = asyncio.create_task(self._supervise(channel), name="engine supervisor")
        return self.info

    def send(self, message: ToEngine) -> None:
        """Raises EngineDeadError while no engine is ready, FrameError if it is too long."""
        if self._channel is None:
            raise EngineDeadError(self.down_because)
        try:
            self._channel.send(message)
        except FrameError:
            raise
        except IPCError as error:
            raise EngineDeadError("The engine process has just ended.") from error

    async def stop(self) -> None:
        """End the engine: ask, then terminate, then kill. Nothing is restarted afterwards."""
        channel, self._channel = self._channel, None
        self.down_because = "The engine has been stopped."
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        if channel is not None:
            try:
                channel.send(Shutdown())
            except IPCError:
                channel = None
        await self._end_process(0.0 if channel is None else STOP_GRACE_S)
        if channel is not None:
            channel.close()

    async def _launch(self) -> AsyncChannel:
        """Start the next generation, wait for its EngineReady."""
        self._generation += 1
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._worker_module,
                "--fd",
                str(theirs.fileno()),
                "--generation",
                str(self._generation),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # stdout belongs to whoever started us
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C is for the parent, and the child may not ignore it yet
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        channel = await AsyncChannel.open(ours, self._generation)
        try:
            channel.send(self._config)
            message = await self._receive(channel)
            if isinstance(message, EngineFailed):
                raise _typed_error(message)
            if not isinstance(message, EngineReady):
                raise FrameError(f"The engine began with {type(message).__name__}.")
        except IPCError as error:
            channel.close()
            raise EngineDeadError(
                f"The engine could not start: {await self._obituary(error)}"
            ) from error
        except BaseException:
            channel.close()
            raise
        if self._info is None:
            self._info = message.info
        self.summary = message.summary
        self._channel = channel
        logger.info("Engine %d is ready: %s", self._generation, json.dumps(message.summary))
        return channel

    async def _receive(self, channel: AsyncChannel) -> object:
        """The next message, or IPCError as soon as the process ends, whoever else holds its fd."""
        assert self._process is not None
        exited = asyncio.ensure_future(self._process.wait())
        received = asyncio.ensure_future(channel.receive())
        try:
            await asyncio.wait((exited, received), return_when=asyncio.FIRST_COMPLETED)
            if not received.done():  # a last message may still be in the socket
                await asyncio.wait((received,), timeout=0.1)
            if received.done():
                return received.result()
            raise IPCError("The engine process ended.")
        finally:
            exited.cancel()
            received.cancel()
            await asyncio.gather(exited, received, return_exceptions=True)

    async def _supervise(self, channel: AsyncChannel) -> None:
        while True:
            reason = await self._serve(channel)
            channel.close()
            self._record_death(f"The engine process died: {reason}.")
            replacement = await self._restart()
            if replacement is None:
                return
            channel = replacement

    async def _serve(self, channel: AsyncChannel) -> str:
        """Hand messages on until the engine dies. Returns how it died."""
        assert self._process is not None
        watcher = asyncio.create_task(self._close_at_exit(self._process, channel))
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, StepOutputs):
                    self._on_outputs(message)
                elif isinstance(message, EngineStats):
                    self.stats = message
                else:
                    raise FrameError(f"Unexpected {type(message).__name__}.")
        except IPCError as error:
            return await self._obituary(error)
        except Exception:
            logger.exception("Handling the engine's output failed.")
            await self._end_process(0.0)
            return "its output could not be handled"
        finally:
            watcher.cancel()

    async def _close_at_exit(
        self, process: asyncio.subprocess.Process, channel: AsyncChannel
    ) -> None:
        await process.wait()
        await asyncio.sleep(0.1)  # let the last frames in
        channel.close()

    async def _restart(self) -> AsyncChannel | None:
        """The next engine's channel; None when there were too many deaths."""
        while not self.gave_up:
            try:
                return await self._launch()
            except JaxLLMError as error:
                await self._end_process(0.0)
                self._record_death(f"The engine did not come up again: {error.message}")
        return None

    def _record_death(self, reason: str) -> None:
        self._channel = None
        self.stats = None
        now = self._clock()
        self._deaths.append(now)
        recent = [time for time in self._deaths if now - time <= DEATH_WINDOW_S]
        self.gave_up = len(recent) >= MAX_DEATHS
        outlook = (
            f"That was death number {MAX_DEATHS} within {DEATH_WINDOW_S:.0f} s: it stays down."
            if self.gave_up
            else "It is being restarted."
        )
        self.down_because = f"{reason} {outlook}"
        logger.error("%s", self.down_because)
        self._on_death(EngineDeadError(self.down_because))

    async def _obituary(self, error: IPCError) -> str:
        """Make sure that the process is gone; say how it went, in words."""
        process = self._process
        assert process is not None
        try:
            code = await asyncio.wait_for(process.wait(), 0.5)
        except TimeoutError:  # it talks nonsense, or closed its socket and lives on
            await self._end_process(0.0)
            return error.message
        if isinstance(error, FrameError):
            return error.message
        return f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"

    async def _end_process(self, grace_s: float) -> None:
        process = self._process
        if process is None:
            return
        for end, seconds in ((None, grace_s), (process.terminate, TERMINATE_GRACE_S)):
            if process.returncode is None and seconds > 0:
                try:
                    if end is not None:
                        end()
                    await asyncio.wait_for(process.wait(), seconds)
                except (TimeoutError, ProcessLookupError):
                    continue
        if process.returncode is None:
            logger.warning("The engine process does not end; killing it.")
            process.kill()
        await process.wait()


def _typed_error(failed: EngineFailed) -> JaxLLMError:
    kind = getattr(jaxllm.errors, failed.error_type, None)
    if not (isinstance(kind, type) and issubclass(kind, JaxLLMError)):
        kind = JaxLLMError
    return kind(failed.message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
