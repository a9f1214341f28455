"""``jaxllm chat``: a conversation in the terminal. Reads lines, prints answers as they come.

The event loop has a thread of its own: this one can then wait for a line, and Ctrl-C reaches it.
"""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import RequestFailedError
from server.client.conversation import Conversation
from server.client.endpoint import Endpoint, connect, local
from server.client.options import ChatOptions

HELP = """\
/reset         forget what was said
/system TEXT   set the system prompt, and forget what was said; without TEXT: none
/thoughts      show what the model thought before its last answer
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer."""
PROMPT = "> "
CLEAN_UP_S = 10.0  # at most, after Ctrl-C
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_UNPRINTABLE = {code: "\ufffd" for code in _CONTROLS if chr(code) not in "\n\t"}


def run_chat(options: ChatOptions, config: EngineConfig, model: str | None) -> int:
    """Until the input ends. Returns 1 if it was no terminal and a question got no answer.

    Raises:
        ConfigError: nobody answers at the URL, or the engine cannot start.
    """
    with _Loop() as loop, contextlib.suppress(BrokenPipeError):
        endpoint = loop.run(_open(options, config, model, loop.stack))
        conversation = Conversation(endpoint, options.fields(), options.system)
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # line editing and history
            print(f"Talking to {endpoint.model}. /help lists the commands.", file=sys.stderr)
        failed = False
        for line in _lines(interactive):
            if line == "/quit":
                break
            if line.startswith("/"):
                _command(line, conversation)
            elif line:
                failed |= not _answer(loop, conversation, line)
        return int(failed and not interactive)
    return 1


async def _open(
    options: ChatOptions, config: EngineConfig, model: str | None, stack: AsyncExitStack
) -> Endpoint:
    if options.url is not None:
        return await connect(options.url, model)
    return await stack.enter_async_context(local(config))


def _lines(interactive: bool) -> Iterator[str]:
    """What was typed, line by line. Ctrl-C begins the line anew, Ctrl-D ends it all."""
    while True:
        try:
            yield input(PROMPT if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _command(line: str, conversation: Conversation) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
    elif name == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
    elif name == "/thoughts":
        print(printable(conversation.thoughts.strip()) or "There were none.", file=sys.stderr)
    elif name == "/help":
        print(HELP, file=sys.stderr)
    else:
        print(f"There is no {name}.\n{HELP}", file=sys.stderr)


def _answer(loop: "_Loop", conversation: Conversation, text: str) -> bool:
    """Prints the answer; False if there is none, or not all of it."""
    try:
        loop.run(_print(conversation, text))
    except RequestFailedError as error:
        print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        print(" [stopped]", file=sys.stderr)
    return True


async def _print(conversation: Conversation, text: str) -> None:
    """Thoughts are only said to be there."""
    thinking = False
    async with aclosing(conversation.ask(text)) as parts:
        try:
            async for part in parts:
                if not part and not thinking:
                    thinking = True
                    print("(thinking; /thoughts shows it)", file=sys.stderr)
                print(printable(part), end="", flush=True)
        finally:
            print(flush=True)


def printable(text: str) -> str:
    """Without the control characters with which a model could take over a terminal."""
    return text.translate(_UNPRINTABLE)


class _Loop:
    """An event loop in a thread. ``stack``: what is closed in it at the end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.stack = AsyncExitStack()

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns. Ctrl-C ends it, and waits until it has cleaned up."""
        ended = threading.Event()

        async def noted() -> T:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(noted(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(CLEAN_UP_S)
            raise

    def __enter__(self) -> "_Loop":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.run(self.stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
