"""The engine, seen from the HTTP process: one worker process after the other, always watched.

Knows when an engine is started, given up or replaced; knows nothing of requests beyond handing
their outputs on.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError, JaxLLMError
from jaxllm.frontend.death_record import MAX_DEATHS, WINDOW_S, DeathRecord
from jaxllm.frontend.watchdog import Watchdog
from jaxllm.frontend.worker_process import WorkerProcess
from jaxllm.ipc import FrameError, IPCError
from jaxllm.messages import (
    EngineStats,
    FromEngine,
    ModelInfo,
    Ping,
    Shutdown,
    StepOutputs,
    ToEngine,
)

logger = logging.getLogger(__name__)

STOP_GRACE_S = 5.0  # after the Shutdown message
RESTART_PAUSE_S = 0.5  # after a start that failed
MIN_RETRY_S, MAX_RETRY_S = 5.0, 60.0  # between them: as long as the last start took


class EngineHungError(IPCError):
    """The engine process lives, and gets nothing done."""


class EngineProcess:
    """One engine process at a time; a dead or hanging one is replaced by the next generation.

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
    ):
        self._config = config
        self._on_outputs = on_outputs
        self._on_death = on_death
        self._worker_module = worker_module
        self._generation = 0
        self._worker: WorkerProcess | None = None
        self._watchdog: Watchdog | None = None  # set while the engine is ready
        self._ready_since = 0.0
        self._start_seconds = 0.0  # of the last start that succeeded
        self._deaths = DeathRecord()
        self._gave_up = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._down_because = "The engine has not been started."  # as clients are told
        self._last_words = ""  # with what only the operator is told: it may name files
        self._info: ModelInfo | None = None
        self.stats: EngineStats | None = None
        self.summary: dict[str, str | int | float] = {}

    @property
    def ready(self) -> bool:
        """Whether requests can be sent."""
        return self._watchdog is not None

    @property
    def unready_because(self) -> str | None:
        """Why the engine is down, or late with its next step; None if all is well."""
        if self._watchdog is None:
            return self._down_because
        if self._watchdog.late:
            return f"The engine has shown no progress for {self._watchdog.silent_s:.0f} s."
        return None

    @property
    def gave_up(self) -> bool:
        """Too many deaths: only ``stop`` is left."""
        return self._gave_up.is_set()

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def pid(self) -> int | None:
        return None if self._worker is None else self._worker.pid

    @property
    def info(self) -> ModelInfo:
        """Of the model being served. Raises EngineDeadError before the first start."""
        if self._info is None:
            raise EngineDeadError(self._down_because)
        return self._info

    def death(self) -> EngineDeadError:
        """The error for a request that meets no engine; it says when to come again."""
        error = EngineDeadError(self._down_because)
        error.retry_after_s = min(max(MIN_RETRY_S, self._start_seconds + 1), MAX_RETRY_S)
        return error

    async def start(self) -> ModelInfo:
        """Start the first engine and wait until it is ready; this may take minutes.

        Raises:
            ConfigError, OutOfMemoryError, ...: the engine said why it cannot start.
            EngineDeadError: it died without a word.
        """
        worker, watchdog = await self._launch()
        self._supervisor = asyncio.create_task(
            self._supervise(worker, watchdog), name="engine supervisor"
        )
        return self.info

    def send(self, message: ToEngine) -> None:
        """Raises EngineDeadError while no engine is ready, FrameError if it is too long."""
        if self._worker is None or not self.ready:
            raise self.death()
        try:
            self._worker.send(message)
        except FrameError:
            raise
        except IPCError as error:
            raise self.death() from error

    async def given_up(self) -> str:
        """Waits until the engine has died too often. Returns the reason, for the operator."""
        await self._gave_up.wait()
        return self._last_words

    async def stop(self, *, at_once: bool = False) -> None:
        """End the engine: ask, then terminate, then kill; or kill it at once. Nothing is restarted
        afterwards.
        """
        grace_s, asked = STOP_GRACE_S, False
        if self._config.kv_offloading_dir is not None:
            grace_s += self._config.kv_offloading_dir_timeout
        if self._worker is not None and self.ready and not at_once:
            try:
                self._worker.send(Shutdown())
                asked = True
            except IPCError:
                logger.info("The engine ended before it was asked to.")
        self._watchdog = None
        self._down_because = "The engine has been stopped."
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        await self._end_worker(grace_s if asked else 0.0)

    async def _launch(self) -> tuple[WorkerProcess, Watchdog]:
        """Start the next generation, wait until it is ready."""
        self._generation += 1
        started = time.monotonic()
        try:
            self._worker = await WorkerProcess.spawn(self._worker_module, self._generation)
            ready = await self._worker.build(self._config)
        except BaseException:
            await self._end_worker(0.0)
            raise
        if self._info is None:
            self._info = ready.info
        self.summary = ready.summary
        self._ready_since = time.monotonic()
        self._start_seconds = self._ready_since - started
        self._watchdog = Watchdog(self._config.step_timeout)
        logger.info("Engine %d is ready: %s", self._generation, json.dumps(ready.summary))
        return self._worker, self._watchdog

    async def _supervise(self, worker: WorkerProcess, watchdog: Watchdog) -> None:
        """Replace dead engines until there is no hope. What goes wrong in here ends hope too, so
        that no server is left that only looks alive.
        """
        try:
            while True:
                await self._serve_until_death(worker, watchdog)
                await self._end_worker(0.0)
                while not self.gave_up:
                    try:
                        worker, watchdog = await self._launch()
                        break
                    except (JaxLLMError, OSError) as error:
                        self._record_death("The engine did not come up again.", 0.0, error)
                        await asyncio.sleep(RESTART_PAUSE_S)
                else:
                    return
        except Exception:
            logger.exception("The engine's supervisor failed.")
            self._lose("The engine is not watched any more: see the log of the server.")
            self._gave_up.set()
            self._on_death(self.death())

    async def _serve_until_death(self, worker: WorkerProcess, watchdog: Watchdog) -> None:
        """Hand messages on until the engine dies or hangs; tell everybody."""

        async def watch() -> None:
            await watchdog.watch(lambda: worker.send(Ping()))
            raise EngineHungError(
                f"it made no progress for {watchdog.timeout_s:g} s (--step-timeout)."
            )

        reader = asyncio.create_task(self._read(worker, watchdog), name="engine reader")
        watcher = asyncio.create_task(watch(), name="engine watchdog")
        try:
            done, _ = await asyncio.wait((reader, watcher), return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        except IPCError as error:
            served = time.monotonic() - self._ready_since - watchdog.silent_s
            self._lose("The engine process has just ended.")
            self._record_death(await worker.obituary(error), served)
        finally:
            reader.cancel()
            watcher.cancel()
            await asyncio.gather(reader, watcher, return_exceptions=True)

    async def _read(self, worker: WorkerProcess, watchdog: Watchdog) -> None:
        while True:
            message = await worker.receive()
            try:
                watchdog.heard(message)
                self._hand_on(message)
            except Exception as error:
                logger.exception("Handling the engine's output failed.")
                raise FrameError("its output could not be handled.") from error

    def _hand_on(self, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            self._on_outputs(message)
        elif isinstance(message, EngineStats):
            self.stats = message
        else:
            raise FrameError(f"It sent an unexpected {type(message).__name__}.")

    def _lose(self, reason: str) -> None:
        """There is no engine from now on; nobody has been told yet."""
        self._watchdog = None
        self.stats = None
        self._down_because = self._last_words = reason

    def _record_death(self, reason: str, served_s: float, cause: Exception | None = None) -> None:
        """``cause`` is for the log and ``given_up``, not for clients."""
        self._deaths.add(served_s)
        outlook = "It is being restarted."
        if self._deaths.hopeless:
            outlook = f"That was death number {MAX_DEATHS} within {WINDOW_S:.0f} s: it stays down."
            self._gave_up.set()
        self._lose(f"{reason} {outlook}")
        if cause is not None:
            self._last_words = f"{reason} {cause} {outlook}"
        logger.error("%s", self._last_words)
        self._on_death(self.death())

    async def _end_worker(self, grace_s: float) -> None:
        """Forgets the worker only when it is gone, so that nobody else has to end it."""
        if self._worker is not None:
            await self._worker.end(grace_s)
            self._worker = None
