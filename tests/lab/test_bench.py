"""``jaxllm lab bench``: times what it says, beside plain attention."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.lab import bench
from jaxllm.lab.bench import Heads, measure
from jaxllm.lab.load import load_variant
from pallas_kernels.attention.variant import CAUSAL
from pallas_kernels.bench.suite import OPERATIONS
from server.cli import main

SMALL = Heads(4, 2, 64)


def test_rows_and_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "fade.json"
    words = ["lab", "bench", "softcap", "--num-heads", "4", "--num-kv-heads", "2"]
    assert main([*words, "--head-dim", "64", "--context", "64", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(row["op"], row["context"]) for row in report["rows"]] == [
        ("decode", 64),
        ("prefill", 64),
    ]
    for row in report["rows"]:
        assert row["times_plain"] == pytest.approx(row["seconds"] / row["plain_seconds"])
        assert row["seconds"] > 0
    assert report["num_heads"] == 4 and report["device"]["platform"] in ("cpu", "gpu")
    printed = capsys.readouterr().out
    assert "softcap on" in printed and "not by the kernel: the decode kernel is built" in printed


def test_wrong_heads_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["lab", "bench", "alibi", "--num-heads", "5", "--num-kv-heads", "2"]) != 0
    assert "multiple" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lab", "bench", "alibi", "--context", "0"])


def test_the_variant_is_what_is_timed() -> None:
    """A slow one takes longer than plain attention, in decode and in prefill."""

    def slow(score: Any, q_pos: Any, kv_pos: Any, head: Any, params: Any) -> Any:
        return jax.lax.fori_loop(0, 1000, lambda i, s: s + jnp.sin(s) * 1e-6, score)

    speeds = measure(dataclasses.replace(CAUSAL, name="slow", score_mod=slow), SMALL, [128])
    assert [speed.times_plain > 2 for speed in speeds] == [True, True]
    assert all(speed.path == "xla" and speed.refused for speed in speeds)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_the_kernels_are_timed_with_the_variant_in_them(op: str) -> None:
    """Lowered for Hopper, as it is for checks, with the plan that its kv_range makes."""
    variant = load_variant("head_windows", {"windows": 16}, SMALL.query)
    spec = getattr(bench, f"{op}_spec")(SMALL, 128, variant)
    operation = OPERATIONS[op]
    config = operation.default(spec)
    assert operation.refuses(spec, config, "sm_90") is None
    timed = operation.timed(spec, config)
    lowered = jax.jit(timed.dispatch).trace().lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
