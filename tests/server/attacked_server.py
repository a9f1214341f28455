"""The guarded application over the real scheduler and a fake device; whether it is as it was."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from server.app import create_app
from server.protocol.http import http_protocol
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import RefusalLog
from server.settings import ServerSettings
from tests.server.sse import read_stream
from tests.server.stepped_engine import SteppedEngine, stepped_llm
from tests.server.wire import listening

MODEL = "fake"
MAX_MODEL_LEN = 128
PLAN = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": MAX_MODEL_LEN,
    "num_blocks": 512,
}
EOS = (257,)  # grammars need one
STEP_SECONDS = 0.001  # so that a victim streams while it is attacked
CANARY = {"model": MODEL, "prompt": "canary", "max_tokens": 8, "seed": 7, "ignore_eos": True}
VICTIM = CANARY | {"prompt": "victim", "max_tokens": 100, "stream": True}


@dataclass
class AttackedServer:
    engine: SteppedEngine
    port: int
    canary: str = ""
    victim: str = ""
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.canary, self.victim = self.ask_canary(), self.stream_victim()

    def ask_canary(self) -> str:
        answer = self.http.post("/v1/completions", json=CANARY)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def stream_victim(self) -> str:
        stream = read_stream(
            httpx.post(f"{self.url}/v1/completions", json=VICTIM, timeout=60).content
        )
        assert stream.done
        return "".join(chunk["choices"][0]["text"] for chunk in stream.objects)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Whatever happens inside: a stream beside it, a canary and the blocks stay the same."""
        seen: list[str] = []
        beside = threading.Thread(target=lambda: seen.append(self.stream_victim()))
        beside.start()
        yield
        beside.join(60)
        assert seen == [self.victim], "a stream beside it has changed"
        self.check_alive()

    def check_alive(self) -> None:
        assert self.http.get("/health/ready").status_code == 200
        assert self.http.get("/health/live").status_code == 200
        assert self.ask_canary() == self.canary
        deadline = time.monotonic() + 30
        while not self.engine.at_rest:
            assert time.monotonic() < deadline, "blocks or requests are left"
            time.sleep(0.002)
        assert self.http.get("/load").json()["server_load"] == 0
        assert self.engine.executor.num_resets == 0


@contextmanager
def attacked_server(
    tokenizer_dir: Path,
    *,
    step_seconds: float = STEP_SECONDS,
    eos_token_ids: tuple[int, ...] = EOS,
    **settings: Any,
) -> Iterator[AttackedServer]:
    ready, stop = threading.Event(), threading.Event()
    made: list[SteppedEngine] = []
    failures: list[BaseException] = []
    chosen = ServerSettings(
        **{"served_model_names": (MODEL,), "max_num_seqs": 8, "access_log": "off"} | settings
    )

    async def step_on(engine: SteppedEngine) -> None:
        try:
            while not stop.is_set():
                if engine.busy:
                    engine.step()
                await asyncio.sleep(step_seconds if engine.busy else STEP_SECONDS)
        except BaseException as error:
            failures.append(error)
            raise

    async def serve(listener: socket.socket) -> None:
        llm, engine = await stepped_llm(tokenizer_dir, eos_token_ids=eos_token_ids, **PLAN)
        made.append(engine)
        protocol = http_protocol(
            ConnectionLimits(max_body_bytes=chosen.max_body_bytes), RefusalLog()
        )
        app = create_app(llm, chosen)
        config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", http=protocol)
        server = uvicorn.Server(config)
        stepping = asyncio.create_task(step_on(engine))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        ready.set()
        await stepping
        server.should_exit = True
        await serving

    with listening() as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)))
        thread.start()
        assert ready.wait(60)
        server = AttackedServer(made[0], listener.getsockname()[1])
        try:
            yield server
        finally:
            server.http.close()
            stop.set()
            thread.join(60)
    assert not failures, failures


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object; anything else fails the test."""
    body = json.loads(response.content)
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error
