"""``jaxllm lab show --maps``: attention of a real engine over a prompt, and its picture."""

from pathlib import Path

import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.lab.maps import AttentionMaps
from jaxllm.lab.plot import plot_maps
from server.cli import main
from server.lab import run_maps

# The cache holds less than the length that block tables are made for.
SMALL = {"load_format": "dummy", "num_gpu_blocks_override": 2}


def test_it_is_where_the_model_looks(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    drawn: list[AttentionMaps] = []

    def keep(title: str, maps: AttentionMaps, path: Path) -> None:
        drawn.append(maps)
        plot_maps(title, maps, path)

    monkeypatch.setattr("jaxllm.lab.plot.plot_maps", keep)
    out, values = tmp_path / "maps.png", tmp_path / "values.json"
    values.write_text('{"window": 4}')
    asked = {"prompt": "abc $ def", "model": str(tiny_model_dir), "layers": (1, -2, 0)}
    run_maps("sliding_window", str(values), out, **asked, settings=SMALL)
    assert out.read_bytes().startswith(b"\x89PNG") and "layers 1, 0" in capsys.readouterr().out
    (maps,) = drawn
    assert (maps.layers, "".join(maps.tokens)) == ((1, 0), "abc $ def")
    count = len(maps.tokens)
    assert maps.probs.shape[0] == 2 and maps.probs.shape[2:] == (count, count)
    np.testing.assert_allclose(maps.probs.sum(-1), 1, atol=1e-5)
    ago = np.arange(count)[:, None] - np.arange(count)[None]
    seen = np.broadcast_to((ago >= 0) & (ago < 4), maps.probs.shape)
    np.testing.assert_array_equal(maps.probs > 0, seen)


def test_what_is_missing_is_said(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["lab", "show", "causal", "--maps", "0", "--out", str(tmp_path / "a.png")]
    assert main(words) != 0 and "needs --prompt" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="its directory"):
        run_maps("causal", None, tmp_path / "no" / "a.png", prompt="a", model="b", layers=(0,))
