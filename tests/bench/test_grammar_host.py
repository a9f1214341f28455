"""The engine against a clock: rows under a grammar end like free ones, and all phases are timed."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench import grammar_host


def test_masks_are_filled_beside_for_many_rows(
    tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_host.masking, "MIXED_COST", dict(grammar_host.masking.MIXED_COST))
    report = tmp_path / "report.json"
    options = ["--rows=8", "--steps=6", "--repeats=1", "--device-ms=1", f"--json={report}"]
    command = ["grammar_host.py", f"--tokenizer={tiny_tokenizer_dir}", *options]
    monkeypatch.setattr(sys, "argv", command)
    assert grammar_host.main() == 0
    phases = json.loads(report.read_text())["host_us"]
    assert phases["constrained"].keys() - phases["free"].keys() >= {"masks, beside"}
    assert phases["free"]["step"] >= 1000, "the device's pace"
