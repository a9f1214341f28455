"""`jaxllm bench kernels` on this CPU: two real shapes, one that fails, and what is reported."""

import argparse
import json
from pathlib import Path

import pytest

from jaxllm.bench import kernels
from jaxllm.errors import ConfigError
from pallas_kernels.bench import ceilings, suite
from server import cli


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    every = suite.cases

    def few(names: list[str]) -> list[suite.Case]:
        return [case for case in every(names) if case.shape in ("one full page", "2 x 5004")]

    monkeypatch.setattr(suite, "cases", few)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda: ceilings.Ceilings(2e10, 3e11))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert cli.main(["bench", "kernels", "--op", "decode", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {"device", "versions", "command", "commit"} <= written.keys()
    assert written["ceilings"]["read_bytes_per_second"] == 2e10
    (row,) = written["rows"]
    assert (row["op"], row["path"], row["config"]) == ("decode", "xla", None)
    assert row["of_ceiling"] == pytest.approx(row["rate"] / 2e10)
    printed = capsys.readouterr().out
    assert "reads 20 GB/s" in printed and "bfloat16 products 0.3 TFLOP/s" in printed
    assert "one full page" in printed and "2 x 5004" not in printed
    assert "decode: the decode kernel is built for sm_90, not cpu" in printed


def test_a_failure_is_shown_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no registers")

    monkeypatch.setattr(type(suite.OPERATIONS["sampling"]), "timed", fail)
    assert cli.main(["bench", "kernels", "--op", "decode", "sampling"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED RuntimeError: no registers" in printed and "one full page" in printed


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        kernels.run_kernels(json_path=tmp_path / "none" / "x.json")


def test_all_operations_can_be_named() -> None:
    parser = argparse.ArgumentParser()
    cli._add_kernels(parser)
    named = parser.parse_args(["--op", *suite.OPERATIONS]).op
    assert tuple(named) == kernels.OPERATIONS == tuple(suite.OPERATIONS)
    assert tuple(parser.parse_args([]).op) == kernels.OPERATIONS
