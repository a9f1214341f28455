"""One engine process of one generation: its start, its frames, its end.

Knows processes and frames; knows nothing of what the frames are for, and starts nothing anew.
"""

import asyncio
import logging
import signal
import socket
import sys

import jaxllm.errors
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError, JaxLLMError
from jaxllm.ipc import AsyncChannel, ChannelClosedError, FrameError, IPCError
from jaxllm.messages import EngineFailed, EngineReady, FromEngine, ToEngine

logger = logging.getLogger(__name__)

TERMINATE_GRACE_S = 2.0  # after SIGTERM
KILL_GRACE_S = 10.0  # after SIGKILL; only the kernel can hold up a process that long
CLOSE_GRACE_S = 1.0
LAST_FRAMES_S = 0.1  # for what is still in the socket of a process that ended
LAST_WORDS_S = 0.5  # for the exit code of a process whose socket closed


class WorkerProcess:
    """A child process and the channel to it. ``spawn`` makes one; ``end`` must be called."""

    def __init__(self, process: asyncio.subprocess.Process, channel: AsyncChannel):
        self._process = process
        self._channel = channel
        self._exit_watcher = asyncio.create_task(self._close_at_exit(), name="engine exit watcher")

    @classmethod
    async def spawn(cls, module: str, generation: int) -> "WorkerProcess":
        """``python -m module``, in a session of its own: Ctrl-C and Ctrl-Z are for the parent."""
        ours, theirs = socket.socketpair()
        try:
            channel = await AsyncChannel.open(ours, generation)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    module,
                    "--fd",
                    str(theirs.fileno()),
                    "--generation",
                    str(generation),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # stdout belongs to whoever started us
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except BaseException:
                channel.close()
                raise
        finally:
            theirs.close()
        return cls(process, channel)  # no await since the process exists: nobody else would end it

    @property
    def pid(self) -> int:
        return self._process.pid

    async def build(self, config: EngineConfig) -> EngineReady:
        """Have it build the engine and wait until it is ready; this may take minutes.

        Raises:
            ConfigError, OutOfMemoryError, ...: the engine said why it cannot start.
            EngineDeadError: it died without a word.
        """
        try:
            self._channel.send(config)
            message = await self._channel.receive()
            if isinstance(message, EngineFailed):
                raise _typed_error(message)
            if not isinstance(message, EngineReady):
                raise FrameError(f"The engine began with {type(message).__name__}.")
            return message
        except IPCError as error:
            reason = await self.obituary(error)
            raise EngineDeadError(f"The engine could not start. {reason}") from error

    def send(self, message: ToEngine) -> None:
        """Raises FrameError (too long; nothing was sent) or ChannelClosedError."""
        self._channel.send(message)

    async def receive(self) -> FromEngine:
        """The next message. Raises IPCError, also when the process ends while something it
        started keeps the socket open.
        """
        return await self._channel.receive()

    async def obituary(self, error: IPCError) -> str:
        """Why ``receive`` raised, in a sentence; waits a moment for the exit code. The process may
        still be there.
        """
        if not isinstance(error, ChannelClosedError):
            return f"The engine process had to be ended: {error.message}"
        if not await self._ends_within(LAST_WORDS_S):
            return "The engine process closed its channel."
        code = self._process.returncode or 0
        end = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        return f"The engine process died: {end}."

    async def end(self, grace_s: float) -> None:
        """Wait that long for the process to end by itself, then terminate, then kill it; without
        grace, kill it at once. Returns when it is gone, or when even that does not help.
        """
        if grace_s > 0 and not await self._ends_within(grace_s):
            logger.warning("The engine process %d does not end by itself.", self.pid)
            self._signal(signal.SIGTERM)
            await self._ends_within(TERMINATE_GRACE_S)
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)
            if not await self._ends_within(KILL_GRACE_S):
                logger.error("The engine process %d cannot be killed; leaving it.", self.pid)
        self._exit_watcher.cancel()
        await asyncio.gather(self._exit_watcher, return_exceptions=True)
        self._channel.close()
        await self._channel.wait_closed(CLOSE_GRACE_S)

    async def _ends_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            return  # it has just ended

    async def _close_at_exit(self) -> None:
        await self._process.wait()
        await asyncio.sleep(LAST_FRAMES_S)
        self._channel.close()


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
