"""The command line: flags, refusals, exit codes, how long it takes to say so."""

import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import jaxllm
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import OutOfMemoryError
from server import cli
from server.flags import Parser, add_flags, from_flags
from server.middleware.auth import tenant_of
from server.serve import ready_line
from server.settings import ServerSettings

ROOT = Path(__file__).parents[2]


def parse(*argv: str) -> EngineConfig:
    parser = Parser(prog="x")
    add_flags(parser, "engine", EngineConfig, skip=("model",))
    return from_flags(EngineConfig, parser.parse_args(argv), model="m")


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and last line on stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert isinstance(code, int)
    return code, captured.err.splitlines()[-1]


def test_flags_are_the_fields() -> None:
    assert parse() == EngineConfig(model="m")
    config = parse(
        "--max-model-len=512", "--no-async-scheduling", "--gpu-memory-utilization", "0.5",
        "--dtype", "float32", "--offline", "--tokenizer", "dir",
    )  # fmt: skip
    assert config == EngineConfig(
        model="m",
        max_model_len=512,
        async_scheduling=False,
        gpu_memory_utilization=0.5,
        dtype="float32",
        offline=True,
        tokenizer="dir",
    )


def test_flags_of_tuples_repeat() -> None:
    parser = Parser(prog="x")
    add_flags(parser, "server", ServerSettings)
    argv = ["--api-key", "a", "b", "--api-key=c", "--served-model-name", "m", "--port", "1"]
    settings = from_flags(ServerSettings, parser.parse_args(argv))
    assert settings == ServerSettings(api_keys=("a", "b", "c"), served_model_names=("m",), port=1)
    assert from_flags(ServerSettings, parser.parse_args([])) == ServerSettings()


def test_every_field_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for field in fields(EngineConfig) + fields(ServerSettings):
        flag = field.metadata.get("flag") or field.name.replace("_", "-")
        assert field.name == "model" or "help" not in field.metadata or f"--{flag}" in text
    for choice in ("bfloat16", "dummy"):
        assert choice in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("serve", "--max-modle-len", "9"), ("--max-modle-len", "did you mean --max-model-len")),
        (("serve", "--nonsense"), ("unknown parameter --nonsense", "jaxllm serve --help")),
        (("bench", "latency", "--batch-sizes=1"), ("did you mean --batch-size?",)),
        (("serve", "--dtype", "int3"), ("--dtype", "bfloat16")),
        (("serve", "--port", "http"), ("--port",)),
        (("serve", "--port", "70000"), ("--port", "65535")),
        (("serve", "--max-n", "129"), ("--max-n", "128")),
        (("serve", "--max-connections", "0"), ("--max-connections", "at least 1")),
        (("serve", "--request-timeout", "nan"), ("--request-timeout",)),
        (("serve", "--api-key", ""), ("API key is empty",)),
        (("serve", "--api-key-file", "/none"), ("/none", "No such file")),
        (("serve", "--cors-origin", "*", "--api-key", "k"), ("--cors-origin *",)),
        (("serve", "--block-size", "3"), ("--block-size", "power of two")),
        (("serve", "--max-model-len", "9" * 20), ("--max-model-len", "too large")),
        (("serve", "--seed", str(-(2**63) - 1)), ("--seed", "too large")),
        (("serve", "--scheduling-policy", "lifo"), ("--scheduling-policy", "fair")),
        (("serve", "--tenant-weights", "a=2"), ("--scheduling-policy fair",)),
        (("serve", "--scheduling-policy=fair", "--tenant-weights", "a"), ("TENANT=WEIGHT",)),
        (("serve", "--scheduling-policy=fair", "--tenant-weights", "a=nan"), ("TENANT=WEIGHT",)),
        (("serve", "--long-prefill-token-threshold", "0"), ("--long-prefill", "at least 1")),
        (("serve", "--target-itl-ms", "nan"), ("--target-itl-ms",)),
        (("serve", ""), ("name is empty",)),
        (("serve", "--host", "0.0.0.0"), ("API key", "--insecure-no-auth")),
        (("serve", "m1", "m2"), ("m2",)),
        (("frobnicate",), ("frobnicate",)),
        ((), ("COMMAND",)),
        (("bench", "throughput", "--workload", "c"), ("--workload",)),
        (("bench", "throughput", "--json", "/none/x.json"), ("--json", "does not exist")),
        (("bench", "throughput", "--workload=b", "--input-len=9"), ("Workload b",)),
        (("bench", "latency", "--output-len", "1"), ("--output-len",)),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.delenv("JAXLLM_API_KEY", raising=False)
    code, line = refusal(capsys, *argv)
    assert code == 2
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_weights_of_keys_reach_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text("key weight=2\n")
    argv = ("serve", "m", "--port", "0", "--api-key-file", str(path))
    code, line = refusal(capsys, *argv)
    assert code == 2 and "--scheduling-policy fair" in line

    class Started(Exception):
        pass

    def start(config: EngineConfig) -> None:
        assert config.scheduling.weight_by_tenant() == {"me": 3.0, tenant_of("key"): 2.0}
        raise Started

    monkeypatch.setattr("server.serve.AsyncLLM", start)
    with pytest.raises(Started):
        cli.main([*argv, "--scheduling-policy", "fair", "--tenant-weights", "me=3"])


def test_typed_errors_set_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> int:
        raise OutOfMemoryError("It does\nnot fit.")

    monkeypatch.setattr("server.serve.serve", fail)
    assert refusal(capsys, "serve", "m") == (3, "error: It does not fit.")


def test_ctrl_c_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxllm.bench.throughput.run_throughput", interrupt)
    assert cli.main(["bench", "throughput", "m"]) == cli.INTERRUPTED


def test_the_default_model_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []

    def remember(config: EngineConfig, options: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr("server.serve.serve", remember)
    assert cli.main(["serve"]) == 0
    assert "default model smollm2-135m" in capsys.readouterr().err
    assert cli.main(["serve", "other", "--seed", "3"]) == 0
    assert "default" not in capsys.readouterr().err
    assert [config.model for config in seen] == ["smollm2-135m", "other"]
    assert seen[1].seed == 3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"jaxllm {jaxllm.__version__}\n"


def test_a_stray_package_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jaxllm, "__file__", str(tmp_path / "jaxllm" / "__init__.py"))
    code, line = refusal(capsys, "serve")
    assert code == 2
    assert str(tmp_path) in line and "server" in line


def test_help_is_quick_and_imports_little() -> None:
    heavy = {"uvicorn", "pydantic", "starlette", "numpy", "msgspec", "asyncio"}
    code = f"import sys, server.cli; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 10.0  # far less, on a machine with nothing else to do
    assert done.stdout.strip() == "[]"


def test_ready_line_can_be_pasted() -> None:
    line = ready_line("http://127.0.0.1:1", 'it\'s "x"')
    assert line.count("\n") == 0
    command = line[line.index("curl") :]
    shown = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"${{@: -1}}\"; }}; {command}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(shown.stdout)["model"] == 'it\'s "x"'
