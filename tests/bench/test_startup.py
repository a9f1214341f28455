"""``jaxllm bench startup`` with a child that only looks like a server."""

import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench.server_process import flags_of, server_process
from jaxllm.bench.startup import run_startup
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, EngineDeadError
from server import cli

CHILD = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
from tests.bench.fake_server import fake_server
(cache,) = [a.split("=", 1)[1] for a in sys.argv if a.startswith("--compilation-cache-dir=")]
known = list(pathlib.Path(cache).iterdir())
(pathlib.Path(cache) / "program").touch()
seconds = 0.0 if known else 0.5
print("INFO jaxllm.frontend.process_client: Engine 1 is ready: "
      f'{{"device": "cpu", "compile_seconds": {seconds}, "start_seconds": 0.25}}', file=sys.stderr)
if not known:
    print("INFO jaxllm.runner.programs: Seconds of lowering and compiling: "
          '{"forward decode[8 tokens, 8 rows]": [1.5, 4.25]}', file=sys.stderr)
with fake_server() as server:
    print("noise")
    print(f"jaxllm: ready on {server.url} - try: curl", flush=True)
    time.sleep(60)
"""


def child(code: str) -> tuple[str, ...]:
    root = str(Path(__file__).parents[2])
    return (sys.executable, "-c", code.replace("{root!r}", repr(root)))


def test_cold_and_warm(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_startup(EngineConfig(), num_iters=2, command=child(CHILD))
    assert [start["cache"] for start in report["starts"]] == ["cold", "warm"] * 2
    assert report["medians"]["cold"]["compile_seconds"] == 0.5
    assert report["medians"]["warm"]["compile_seconds"] == 0.0
    told = [start["program_seconds"] for start in report["starts"]]
    assert told == [{"forward decode[8 tokens, 8 rows]": [1.5, 4.25]}, {}] * 2
    for start in report["starts"]:
        assert 0 < start["ready_seconds"] < start["first_token_seconds"]
    out = capsys.readouterr().out
    assert "compile" in out and "first token" in out


def test_a_server_that_does_not_start_says_why() -> None:
    failing = child("import sys; sys.exit('error: No such model.')")
    with (
        pytest.raises(EngineDeadError, match=r"ended before it was ready: No such model\."),
        server_process(EngineConfig(), timeout_s=30, command=failing),
    ):
        pass


def test_a_server_that_hangs_is_given_up() -> None:
    hanging = child("import time; time.sleep(60)")
    with (
        pytest.raises(EngineDeadError, match=r"not ready within 0\.5 s"),
        server_process(EngineConfig(), timeout_s=0.5, command=hanging),
    ):
        pass


def test_flags_give_the_same_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineConfig] = []

    def remember(config: EngineConfig, options: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr("server.serve.serve", remember)
    config = EngineConfig(
        model="m",
        max_model_len=64,
        offline=True,
        async_scheduling=False,
        seed=-3,
        tokenizer="-t",
        allowed_model_sources=("/models", "org"),
    )
    assert cli.main(["serve", *flags_of(config)]) == 0
    assert seen == [config]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({}, {"num_iters": 0}, "--num-iters"),
        ({}, {"timeout_s": 0.0}, "--timeout"),
        ({"compilation_cache_dir": "x"}, {}, "--compilation-cache-dir"),
    ],
)
def test_refusals(config: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_startup(EngineConfig(**config), **options)
