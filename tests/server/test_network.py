"""The serving process, watched while clients ask it for things it must not fetch."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import command

URL = "http://127.0.0.1:9/model.safetensors"
WATCH = """
import atexit, signal, sys

seen, watching = [], []

def watch(event, args):
    outwards = ("connect", "sendto", "sendmsg", "bind", "getaddrinfo", "gethostbyname")
    if not watching or event.split(".")[0] not in ("socket", "open", "subprocess", "os"):
        return
    if event.startswith("socket.") and event.removeprefix("socket.") not in outwards:
        return
    if event in ("open", "os.listdir") and str(args[0]).startswith("/proc/"):
        return
    seen.append(f"{event} {args!r}")

sys.addaudithook(watch)
signal.signal(signal.SIGUSR1, lambda *_: watching.append(True))
atexit.register(lambda: (watching.clear(), print("SEEN", seen, file=sys.stderr)))
"""


def asks() -> list[tuple[str, str, dict[str, Any] | None]]:
    """Everything that names a place somewhere else."""
    image = [{"type": "image_url", "image_url": {"url": URL}}]
    audio = [{"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}}]

    def chat(content: object, **more: object) -> tuple[str, str, dict[str, Any]]:
        messages = [{"role": "user", "content": content}]
        return "POST", "/v1/chat/completions", {"model": "fake", "messages": messages} | more

    def complete(**more: object) -> tuple[str, str, dict[str, Any]]:
        return "POST", "/v1/completions", {"model": "fake", "prompt": "Hi", "max_tokens": 2} | more

    return [
        chat("Hi", max_tokens=2),
        chat("Hi", max_tokens=2, stream=True),
        chat(image),
        chat(audio),
        chat("Hi", tools=[{"type": "mcp", "server_url": URL}], max_tokens=2),
        chat("Hi", metadata={"url": URL}, user=URL, max_tokens=2),
        chat("Hi", chat_template=URL),
        chat("Hi", chat_template_kwargs={"chat_template": URL}),
        chat("Hi", documents=[{"url": URL}]),
        complete(),
        complete(prompt=URL),
        complete(model="meta-llama/Llama-3.1-8B"),
        complete(model=URL),
        complete(model="../../../etc/passwd"),
        complete(model="/etc/passwd"),
        complete(lora_request={"lora_path": URL}, kv_transfer_params={"remote_host": URL}),
        complete(prompt_embeds=URL),
        complete(cache_salt=URL),
        ("GET", "/v1/models", None),
        ("GET", f"/v1/models/{URL}", None),
        ("GET", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", None),
        ("GET", "/../../../etc/passwd", None),
        ("GET", "/metrics", None),
        ("GET", "/health", None),
        *[("POST", f"/v1/{name}", {"lora_name": "x", "lora_path": URL, "model": URL})
          for name in ("load_lora_adapter", "files", "update_weights", "models", "audio/speech")],
    ]  # fmt: skip


def ask_all(url: str) -> list[int]:
    with httpx.Client(base_url=url, timeout=20) as http:
        return [http.request(method, path, json=body).status_code for method, path, body in asks()]


def test_no_request_makes_the_server_reach_out(
    tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection, no name looked up, no file opened, no process started."""
    monkeypatch.setattr(command, "PROGRAM", WATCH + command.PROGRAM)
    with command.serve_command(tiny_tokenizer_dir, "paced:1") as served:
        url = served.url()
        before = ask_all(url)  # what is imported on its first use
        served.process.send_signal(signal.SIGUSR1)
        after = ask_all(url)
        listeners = listening_ports([served.process.pid, *served.engine_pids()])
        served.process.terminate()
        log = served.end()
    assert before == after
    assert set(after) <= {200, 400, 404, 405}
    assert after.count(200) >= 6
    seen = re.search(r"^SEEN (.*)$", log, re.MULTILINE)
    assert seen and seen[1] == "[]"
    assert listeners == [int(url.rpartition(":")[2])]


def listening_ports(pids: list[int]) -> list[int]:
    """TCP ports on which these processes listen."""
    inodes: set[str] = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed: it listens no more
                if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd)):
                    inodes.add(found[1])
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [int(r[1].rpartition(":")[2], 16) for r in rows if r[3] == "0A" and r[9] in inodes]


def test_the_watcher_sees(tmp_path: Path) -> None:
    """Not only silence: the hook notices what it is there for."""
    program = f"""{WATCH}
import socket
watching.append(True)
open({str(tmp_path / "x")!r}, "w").close()
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
"""
    log = command.subprocess.run(
        [command.sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stderr
    assert "open" in log and "socket.getaddrinfo" in log and "socket.connect" in log
