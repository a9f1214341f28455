"""The engine process's one loop: messages in, steps, results out. Knows no model and no device."""

import gc
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import JaxLLMError
from jaxllm.ipc import ChannelClosedError, IPCError, SyncChannel
from jaxllm.messages import (
    AbortRequests,
    EngineCoreOutput,
    EngineCoreRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    ModelInfo,
    Ping,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from jaxllm.taps.check import MAX_TAP_BYTES

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0


class Core(Protocol):
    """What the loop needs of EngineCore."""

    def add_request(self, request: EngineCoreRequest) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def step(self) -> StepOutputs | None: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class BuiltEngine(Protocol):
    @property
    def core(self) -> Core: ...
    @property
    def info(self) -> ModelInfo: ...
    @property
    def summary(self) -> dict[str, str | int | float]: ...


def run_worker(
    sock: socket.socket, generation: int, build: Callable[[EngineConfig], BuiltEngine]
) -> int:
    """Build the engine that the first frame asks for and serve until told to stop.

    Returns the exit code. When the parent goes away the whole process ends at once, in whatever
    it is doing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; the parent decides
    channel = SyncChannel(sock, generation)
    try:
        config = channel.receive(EngineConfig)
    except ChannelClosedError:
        return 0
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read_forever, args=(channel, inbox, os._exit), name="ipc reader", daemon=True
    )
    reader.start()
    try:
        engine = build(config)
    except JaxLLMError as error:
        channel.send(EngineFailed(type(error).__name__, error.message))
        return error.exit_code
    except Exception as error:
        logger.exception("The engine cannot start.")
        channel.send(EngineFailed("JaxLLMError", f"{type(error).__name__}: {error}"))
        return 1
    gc.collect()
    gc.freeze()  # what exists now lives as long as the process: never look at it again
    channel.send(EngineReady(engine.info, engine.summary))
    try:
        ServeLoop(engine.core, inbox, channel.send).run()
    except ChannelClosedError:
        return 0
    engine.core.close()
    return 0


def in_parts(outputs: StepOutputs) -> list[StepOutputs]:
    """A step's results in as many messages as their taps need: at most ``MAX_TAP_BYTES`` of them in
    each, or those of one request, which are no more.
    """
    if not any(event.taps for event in outputs.events):
        return [outputs]
    parts: list[list[EngineCoreOutput]] = [[]]
    size = 0
    for event in outputs.events:
        mine = sum(len(value.data) for value in event.taps)
        if parts[-1] and size + mine > MAX_TAP_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(event)
        size += mine
    first = msgspec.structs.replace(outputs, events=parts[0])
    return [first, *(StepOutputs(outputs.step_id, events=events) for events in parts[1:])]


def _read_forever(
    channel: SyncChannel, inbox: "queue.SimpleQueue[ToEngine]", end: Callable[[int], object]
) -> None:
    try:
        while True:
            inbox.put(channel.receive())
    except ChannelClosedError:
        end(0)
    except IPCError as error:
        logger.error("The frontend sent what is not a message: %s", error.message)
        end(1)


class ServeLoop:
    """Adds, aborts and steps, in the order in which messages came."""

    def __init__(
        self,
        core: Core,
        inbox: "queue.SimpleQueue[ToEngine]",
        send: Callable[[StepOutputs | EngineStats], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._core = core
        self._inbox = inbox
        self._send = send
        self._clock = clock
        self._refused: list[EngineCoreOutput] = []
        self._next_stats = clock()

    def run(self) -> None:
        """Until a Shutdown message. An exception of ``step`` ends the process: it is a bug."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Take in what has arrived, or wait for it if there is nothing to do; make one step; say
        what came of it. False: stop.
        """
        if not self._take_messages():
            return False
        if self._refused:
            self._send(StepOutputs(step_id=-1, events=self._refused))
            self._refused = []
        if self._core.has_work():
            outputs = self._core.step()
            for part in in_parts(outputs) if outputs is not None else ():
                self._send(part)
        self._report(idle=not self._core.has_work())
        return True

    def _take_messages(self) -> bool:
        """Handle all that has arrived; wait for it if there is nothing to do. False: stop."""
        try:
            message = self._inbox.get(block=not self._core.has_work())
            while True:
                if isinstance(message, Shutdown):
                    return False
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _handle(self, message: EngineCoreRequest | AbortRequests | Ping) -> None:
        if isinstance(message, Ping):
            return  # what is said after every turn of the loop is the answer
        if isinstance(message, AbortRequests):
            self._core.abort(message.request_ids)
            return
        try:
            self._core.add_request(message)
        except JaxLLMError as error:
            self._refuse(message, error.message)
        except Exception:
            logger.exception("Request %s could not be added.", message.request_id)
            self._refuse(message, "The engine could not take this request.")

    def _refuse(self, request: EngineCoreRequest, reason: str) -> None:
        self._refused.append(
            EngineCoreOutput(request.request_id, finish_reason="error", error=reason)
        )

    def _report(self, *, idle: bool) -> None:
        now = self._clock()
        if idle or now >= self._next_stats:
            self._next_stats = now + STATS_INTERVAL_S
            self._send(self._core.stats())
