"""``jaxllm chat``: over a real port, over the application in this process, in a real terminal."""

import asyncio
import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxllm.bench.http_client import HTTPError
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, EngineDeadError
from server import cli
from server.app import create_app
from server.client.chat import printable, run_chat
from server.client.conversation import Conversation
from server.client.endpoint import LocalEndpoint, read_body
from server.client.options import ChatOptions
from server.settings import ServerSettings
from tests.server.fake_client import ANSWER, FakeClient
from tests.server.test_tools import THOUGHTS, says
from tests.server.wire import running

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(engine: FakeClient) -> Iterator[str]:
    with running(create_app(engine, ServerSettings(served_model_names=("fake",)))) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def chat(url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with these lines as its piped input."""

    def run(text: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return cli.main(["chat", "--url", url, *flags])

    return run


@pytest.fixture
def local(engine: FakeClient) -> LocalEndpoint:
    settings = ServerSettings(served_model_names=("fake",), access_log="off")
    return LocalEndpoint(create_app(engine, settings), "fake")


def test_piped_lines_are_answered(
    chat: Callable[..., int], engine: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--system", "Be kind.", "--temperature", "0", "--max-tokens", "50", "--top-k", "3")
    assert chat("Hi\n\nAnd now?\n", *flags) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    first, second = map(str, engine.prompts)
    assert "Be kind." in first and "Hi" in first
    assert ANSWER in second and "And now?" in second
    params = engine.params[0]
    assert (params.temperature, params.max_tokens, params.top_k) == (0, 50, 3)


def test_commands(
    chat: Callable[..., int], engine: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("one\n/reset\ntwo\n/system Sing.\nthree\n/what\n/help\n/quit\nfour\n") == 0
    prompts = list(map(str, engine.prompts))
    assert len(prompts) == 3
    assert "one" not in prompts[1] and "two" in prompts[1]
    assert "Sing." in prompts[2] and "two" not in prompts[2]
    assert "There is no /what." in capsys.readouterr().err


def test_thoughts_stand_apart(
    engine: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(engine, THOUGHTS)
    settings = ServerSettings(served_model_names=("fake",), reasoning_parser="qwen3")
    with running(create_app(engine, settings)) as port:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/thoughts\nAnd?\n/reset\n/thoughts\n"))
        assert cli.main(["chat", "--url", f"http://127.0.0.1:{port}"]) == 0
    told = capsys.readouterr()
    assert told.out == "Yes.\nYes.\n"
    assert told.err.count("(thinking") == 2 and told.err.count("Hm, é.") == 1
    assert "There were none." in told.err
    assert "Yes." in str(engine.prompts[1]) and "Hm, é." not in str(engine.prompts[1])


def test_failures_are_told_and_forgotten(
    chat: Callable[..., int],
    engine: FakeClient,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.fail_with = EngineDeadError("The engine has gone.")
    assert chat("Hi\n") == 1
    assert capsys.readouterr() == ("\n", "error: The engine has gone.\n")
    engine.fail_at = 5  # in the middle of the stream
    assert chat("Hi\n") == 1
    assert capsys.readouterr() == (f"{ANSWER[:5]}\n", "error: The engine has gone.\n")
    engine.fail_with = None
    assert chat("x" * 300 + "\nshort\n") == 1  # the first is longer than the model takes
    out, err = capsys.readouterr()
    assert "at most 256 tokens" in err and out == f"\n{ANSWER}\n"
    assert "xxx" not in str(engine.prompts[-1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "localhost"], "--url localhost is no URL"),
        (["--url", "http://127.0.0.1:9"], "There is no server at http://127.0.0.1:9"),
        (["--url", "http://127.0.0.1:9", "--block-size", "8"], "Flags of the engine are for a"),
    ],
)
def test_wrong_arguments(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_model_cannot_take_over_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07\n\tö\x9b2J\r\x7f") == "a�]0;title�\n\tö�2J��"


def test_the_application_in_this_process(local: LocalEndpoint, engine: FakeClient) -> None:
    async def talk() -> None:
        conversation = Conversation(local, {"max_tokens": 60})
        assert "".join([part async for part in conversation.ask("Hi")]) == ANSWER
        assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
        async with local.post("/v1/models/nothing", {}) as answer:
            assert answer.status == 405
            assert b"method_not_allowed" in await read_body(answer)
            assert answer.headers["content-type"] == "application/json"

    asyncio.run(talk())


def test_leaving_early_aborts_and_keeps_what_came(local: LocalEndpoint, engine: FakeClient) -> None:
    engine.step_seconds = 0.01

    async def talk() -> None:
        conversation = Conversation(local, {})
        answer = conversation.ask("Hi")
        begun = await anext(answer) + await anext(answer)
        await answer.aclose()
        assert engine.num_running == 0 and engine.aborted == engine.request_ids
        assert conversation.messages[-1] == {"role": "assistant", "content": begun}

    asyncio.run(talk())


def test_an_application_that_fails_is_no_answer() -> None:
    async def silent(scope: object, receive: object, send: object) -> None:
        return

    async def broken(scope: object, receive: object, send: Callable[..., object]) -> None:
        raise ZeroDivisionError

    async def ask(app: object) -> None:
        async with LocalEndpoint(app, "x").post("/", {}):  # pyright: ignore[reportArgumentType]
            pass

    for app in (silent, broken):
        with pytest.raises(HTTPError):
            asyncio.run(ask(app))


class Terminal:
    """What a person sees and types."""

    def __init__(self, file: int):
        self._file = file
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until it was shown after what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.seen!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                self.seen += os.read(self._file, 4096).decode()
        self.seen = self.seen.partition(text)[2]


@contextmanager
def terminal(*command: str) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_SESSION, *command],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


_IN_SESSION = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that the terminal's Ctrl-C reaches us
from server.cli import main
sys.exit(main(sys.argv[1:]))
"""


def is_waiting(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_in_a_terminal(url: str, engine: FakeClient) -> None:
    with terminal("chat", "--url", url) as (screen, process):
        screen.wait_for("Talking to fake.")
        screen.wait_for("> ")
        screen.type("not this")
        screen.wait_for("not this")
        wait_until(lambda: is_waiting(process.pid))  # for the next key, after this one's echo
        screen.type("\x03")  # Ctrl-C: the line anew
        screen.wait_for("> ")
        engine.step_seconds = 0.1
        screen.type("Hi\n")
        screen.wait_for("Hel")
        screen.type("\x03")  # Ctrl-C: the answer ends, the program does not
        screen.wait_for("[stopped]")
        wait_until(lambda: engine.aborted == engine.request_ids)
        engine.step_seconds = 0.0
        screen.wait_for("> ")
        screen.type("Again\n")
        screen.wait_for(ANSWER)
        screen.wait_for("> ")
        screen.type("\x04")  # Ctrl-D
        assert process.wait(30) == 0
    assert "not this" not in str(engine.prompts)
    assert "Hel" in str(engine.prompts[1])


def test_without_a_url_it_needs_no_server() -> None:
    with pytest.raises(ConfigError):
        run_chat(ChatOptions(), EngineConfig(model="/nowhere"), None)
