"""``jaxllm lab show``: the picture says what the functions do, and is a PNG."""

from pathlib import Path

import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.lab.bench import Speed
from jaxllm.lab.load import load_variant
from jaxllm.lab.picture import SCORES, make_picture
from jaxllm.lab.plot import plot
from server.cli import main


def test_heads_that_differ_are_apart_and_hidden_is_hidden() -> None:
    variant = load_variant("head_windows", {"windows": [2, 2, 100, 3]}, 4)
    picture = make_picture(variant, 4, 6)
    assert picture.heads == ((0, 1), (2,), (3,)) and not picture.changes_scores
    causal = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(picture.visible[0], causal & ~np.tril(causal, -2))
    np.testing.assert_array_equal(picture.visible[1], causal)
    np.testing.assert_array_equal(np.isnan(picture.added), ~picture.visible)
    assert picture.distances == (0, 1, 5)
    assert np.isnan(picture.curves[0, 2]).all(), "five back is outside a window of two"


def test_what_scores_become() -> None:
    picture = make_picture(load_variant("softcap", {"cap": 2.0}, 2), 2, 4)
    assert picture.heads == ((0, 1),) and picture.changes_scores
    for curve in picture.curves[0]:
        np.testing.assert_allclose(curve, 2 * np.tanh(SCORES / 2), atol=1e-5)
    np.testing.assert_allclose(picture.added[0, 0, 0], 2 * np.tanh(0.5) - 1, atol=1e-5)
    alibi = make_picture(load_variant("alibi", {"slopes": [1.0, 0.5]}, 2), 2, 4)
    np.testing.assert_allclose(alibi.added[:, 3], [[-3, -2, -1, 0], [-1.5, -1, -0.5, 0]])
    ahead = make_picture(load_variant("prefix_lm", {"prefix_len": 3}, 2), 2, 4)
    assert ahead.visible[0, 0].tolist() == [True, True, True, False]


def test_it_is_drawn_from_the_command_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "alibi.png"
    words = ["lab", "show", "alibi", "--prompt", "$a b", "--model", str(tiny_model_dir)]
    assert main([*words, "--out", str(out)]) == 0
    assert "4 kinds of heads" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG") and _colours(out) > 50
    assert main(["lab", "show", "alibi", "--num-tokens", "513", "--out", str(out)]) != 0
    assert "1 to 512" in capsys.readouterr().err


def test_speed_stands_below(tmp_path: Path) -> None:
    picture = make_picture(load_variant("causal", None, 2), 2, 8)
    speeds = [
        Speed(op, 4, context, "xla", None, 2e-6 * context, 1e-6 * context)
        for context in (128, 512)
        for op in ("decode", "prefill")
    ]
    for name, measured in (("without", []), ("with", speeds)):
        plot("causal", picture, measured, tmp_path / name)
    heights = [int.from_bytes((tmp_path / n).read_bytes()[20:24]) for n in ("without", "with")]
    assert heights[1] == 2 * heights[0]
    with pytest.raises(ConfigError, match="--out"):
        plot("causal", picture, [], tmp_path / "nowhere" / "a.png")


def _colours(path: Path) -> int:
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))
