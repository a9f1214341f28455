"""The command's own guard: what its flags say holds on the port it opens."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.command import ROOT, completion, serve_command
from tests.server.wire import request, say

KEY = "a-key-from-a-file"
PAGE = "https://page.example"


def test_flags_reach_the_port(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# for tests\n{KEY}\nanother\n")
    flags = (
        "--api-key-file", str(keys), "--api-key", "third", "--max-body-bytes", "1000",
        "--max-n", "2", "--request-timeout", "0.5", "--cors-origin", PAGE, "--metrics-no-auth",
        "--allowed-hosts", "llm.example", "--max-num-queued-tokens", "0",
    )  # fmt: skip
    with serve_command(tiny_tokenizer_dir, "paced:100", *flags) as command:
        url = command.url()
        port = int(url.rpartition(":")[2])
        with httpx.Client(base_url=url) as http:
            for key in (KEY, "another", "third"):
                headers = {"authorization": f"Bearer {key}"}
                assert http.get("/v1/models", headers=headers).status_code == 200
            assert http.get("/v1/models").status_code == 401
            assert http.get("/metrics").status_code == 200
            assert http.options("/v1/models", headers={"origin": PAGE}).status_code == 401
            preflight = {"origin": PAGE, "access-control-request-method": "POST"}
            assert http.options("/v1/completions", headers=preflight).status_code == 200
            headers = {"authorization": f"Bearer {KEY}", "host": "llm.example"}
            assert http.get("/v1/models", headers=headers).status_code == 200
            assert http.get("/health", headers={"host": "localhost"}).status_code == 403
            headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
            too_many = json.dumps({"model": "fake", "prompt": "x", "n": 3})
            answer = http.post("/v1/completions", content=too_many, headers=headers)
            assert answer.json()["error"]["code"] == "integer_above_max_value"
            asked: dict[str, Any] = completion(50, stream=False) | {"headers": headers}
            assert http.post("/v1/completions", **asked).status_code == 504
        assert say(port, request("/", "Content-Length: 1001", method="POST")).status == 413
        assert say(port, b"noise\r\n\r\n").error["code"] == "malformed_http"
        command.process.terminate()
        log = command.end()
    assert not any(key in log for key in (KEY, "another", "third"))
    assert "Refused connections" in log


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "API key"),
        (("--host", "::"), "API key"),
        (("--host", ""), "API key"),
        (("--api-key-file", str(ROOT / "pyproject.toml")), "no header could carry"),
        (("--cors-origin", "*", "--api-key", "k"), "--cors-origin *"),
    ],
)
def test_refusals_to_start(
    tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], words: str
) -> None:
    monkeypatch.delenv("JAXLLM_API_KEY", raising=False)
    with serve_command(tiny_tokenizer_dir, "paced:100", *flags) as command:
        log = command.end(2)
    assert words in log.splitlines()[-1]


def test_a_public_address_without_a_key_is_said_aloud(tiny_tokenizer_dir: Path) -> None:
    flags = ("--host", "0.0.0.0", "--insecure-no-auth")
    with serve_command(tiny_tokenizer_dir, "paced:100", *flags) as command:
        assert command.process.stdout is not None
        assert "ready on" in command.process.stdout.readline()
        command.process.terminate()
        assert "it asks no key" in command.end()
