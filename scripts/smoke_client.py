"""Start ``scripts/serve.sh`` on a free port, chat with it through the openai client, end it.

    smoke_client.py [ARGUMENT-OF-JAXLLM-SERVE...]

Exits with 0 if the streamed answer is right and the server ends cleanly on Ctrl-C.
"""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from openai import OpenAI

SERVE = Path(__file__).resolve().with_name("serve.sh")
START_SECONDS = 300.0
STOP_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"smoke: the server ended with exit code {server.returncode} while starting")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"smoke: the server was not healthy after {START_SECONDS:.0f} s")


def chat(url: str) -> tuple[str, float]:
    """The streamed answer to a question, and the seconds until its first token."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        started = time.monotonic()
        first = 0.0
        text = ""
        reason = None
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0.0,
            max_tokens=32,
            stream=True,
        )
        for chunk in stream:
            if not chunk.choices:
                continue
            piece = chunk.choices[0].delta.content or ""
            first = first or (time.monotonic() - started if piece else 0.0)
            text += piece
            reason = chunk.choices[0].finish_reason or reason
    if reason not in ("stop", "length") or "Paris" not in text:
        sys.exit(f"smoke: finish_reason {reason!r}, answer {text!r}; expected one that names Paris")
    return text, first


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    command = [str(SERVE), "--host", "127.0.0.1", "--port", str(port), *sys.argv[1:]]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until_healthy(server, url)
        healthy = time.monotonic() - started
        text, first = chat(url)
        server.send_signal(signal.SIGINT)
        code = server.wait(STOP_SECONDS)
    finally:
        if server.poll() is None:
            server.kill()
    print(f"smoke: {text!r}")
    print(f"smoke: healthy after {healthy:.1f} s, first token {first:.2f} s after the request")
    if code != 0:
        sys.exit(f"smoke: the server ended with exit code {code} on Ctrl-C, expected 0")


if __name__ == "__main__":
    main()
