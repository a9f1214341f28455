"""What goes wrong on the way to an engine is said in one line."""

from pathlib import Path

import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.worker import wiring


def test_a_cache_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "file"
    taken.touch()
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(taken / "cache"))
    monkeypatch.setattr(wiring, "_configure_jax", lambda config: None)
    with pytest.raises(ConfigError, match=r"Cannot read or write \S+: Not a directory\."):
        wiring.build_engine(EngineConfig())
