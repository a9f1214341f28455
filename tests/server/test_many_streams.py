"""256 streams at once, whole and even. ``scripts/soak_streams.py`` does it for longer."""

from pathlib import Path

import pytest

from tests.server.command import serve_command
from tests.server.many_streams import measure

PERIOD_S = 0.05


@pytest.mark.slow
@pytest.mark.alone
def test_256_streams_for_ten_seconds(tiny_tokenizer_dir: Path) -> None:
    flags = ("--max-model-len", "1000000", "--max-num-seqs", "256")
    with serve_command(tiny_tokenizer_dir, f"paced:{1000 * PERIOD_S:g}", *flags) as command:
        measure(command, streams=256, seconds=10, period=PERIOD_S).check()
