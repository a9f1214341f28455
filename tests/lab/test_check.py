"""``jaxllm lab check``, by the guide in jaxllm/lab/README.md."""

import re
from pathlib import Path

import pytest

from jaxllm.errors import ConfigError
from jaxllm.lab.check import check_variant

ROOT = Path(__file__).resolve().parents[2]
WRONG_RANGE = """
from pallas_kernels.attention.variant import AttentionVariant

def seen(q_pos, kv_pos, head, params):
    return q_pos - kv_pos < 60

def span(q_first, q_last, params):
    return q_last - 60, q_last  # of the last query, not of the first

WRONG = AttentionVariant("wrong", mask_mod=seen, kv_range=span)
"""


@pytest.fixture
def guided(tmp_path: Path) -> str:
    """The guide's variant, from its text."""
    text = (ROOT / "jaxllm" / "lab" / "README.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "longer.py").write_text(code)
    return f"{tmp_path / 'longer.py'}:LOG_N"


def test_the_guides_variant_is_right(guided: str) -> None:
    findings = check_variant(guided, {"trained": 16})
    assert {finding.what for finding in findings if finding.ok is None} == {
        "kv_range hides nothing",
        "kernels = reference",
    }
    assert all(finding.ok is not False for finding in findings), findings
    printed = (ROOT / "jaxllm" / "lab" / "README.md").read_text()
    named = [finding.what for finding in findings]
    assert all(re.search(rf"^{re.escape(what)} +(ok|-) ", printed, re.MULTILINE) for what in named)


def test_a_variant_that_did_nothing_is_said_to(guided: str) -> None:
    first = check_variant(guided)[0]
    assert first.ok is None and "--params" in first.said


def test_what_no_request_may_bring_is_refused(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "from pallas_kernels.attention.variant import AttentionVariant, Param\n"
        "TWO = AttentionVariant('two', lambda s, q, k, h, p: s * p.both[0] + p.both[1],\n"
        "                       params=(Param('both', 'per_row', default=1.0, size=2),))\n"
    )
    with pytest.raises(ConfigError, match="both takes a list of 2 numbers"):
        check_variant(f"{tmp_path}/two.py", {"both": 4})


def test_scores_that_are_no_numbers_end_the_check(tmp_path: Path) -> None:
    (tmp_path / "steep.py").write_text(
        "import jax.numpy as jnp\n"
        "from pallas_kernels.attention.variant import AttentionVariant\n"
        "STEEP = AttentionVariant('steep',\n"
        "    lambda s, q, k, h, p: s - jnp.log((q - k).astype(jnp.float32)))\n"
    )
    (finding,) = check_variant(f"{tmp_path}/steep.py")
    assert finding.ok is False and "query 0 and key 0" in finding.said


def test_a_range_that_hides_what_is_seen_fails(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG_RANGE)
    findings = {finding.what: finding.ok for finding in check_variant(f"{tmp_path}/wrong.py")}
    assert findings["kv_range hides nothing"] is False
    assert findings["lowers for sm_90"] is True
