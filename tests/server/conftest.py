"""The application over a fake engine, in this thread and on a real port."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from jaxllm.messages import ModelInfo
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.app import create_app
from server.protocol.http import http_protocol
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import RefusalLog
from server.settings import ServerSettings
from server.sse import EventStream
from tests.server.fake_client import FakeClient
from tests.server.sse import Recorder

MODEL = "fake"
MAX_MODEL_LEN = 256


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tiny_tokenizer_dir)


@pytest.fixture(autouse=True)
def every_stream_ends_in_one_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However a test reads its streams, and whether it reads them."""
    recorders: list[Recorder] = []
    answer = EventStream.__call__

    async def recorded(self: EventStream, scope: Scope, receive: Receive, send: Send) -> None:
        recorder = Recorder()
        recorders.append(recorder)
        await answer(self, scope, *recorder.watch(receive, send))

    monkeypatch.setattr(EventStream, "__call__", recorded)
    yield
    for recorder in recorders:
        recorder.check()


@pytest.fixture
def engine(tokenizer: Tokenizer, tiny_tokenizer_dir: Path) -> FakeClient:
    info = ModelInfo("org/fake", str(tiny_tokenizer_dir), MAX_MODEL_LEN, 258, (257,))
    return FakeClient(tokenizer, info)


@pytest.fixture
def serve(engine: FakeClient) -> Callable[..., TestClient]:
    """A client of the application with other settings than the default."""

    def make(**settings: object) -> TestClient:
        fields = {"served_model_names": (MODEL, "alias"), **settings}
        return TestClient(create_app(engine, ServerSettings(**fields)))

    return make


@pytest.fixture
def http(serve: Callable[..., TestClient]) -> TestClient:
    return serve()


@pytest.fixture
def live(engine: FakeClient) -> Iterator[str]:
    """URL of the application on a free port of this machine; pings every 0.2 s."""
    settings = ServerSettings(served_model_names=(MODEL,), ping_interval_s=0.2)
    protocol = http_protocol(ConnectionLimits(), RefusalLog())
    app = create_app(engine, settings)
    config = uvicorn.Config(app, log_config=None, ws="none", loop="asyncio", http=protocol)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
