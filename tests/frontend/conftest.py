"""A tokenizer, a model and a worker for tests of the text side."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jaxllm.messages import ModelInfo
from jaxllm.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tiny_tokenizer_dir)


@pytest.fixture
def info(tiny_tokenizer_dir: Path) -> ModelInfo:
    return ModelInfo("fake", str(tiny_tokenizer_dir), 64, 258, (257,))


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the fake worker's module, importable in a child process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return "tests.frontend.fake_worker"


@pytest.fixture
def settings(tiny_tokenizer_dir: Path) -> Callable[..., dict[str, object]]:
    """EngineConfig fields for the fake worker."""

    def make(model: str = "fake", **more: object) -> dict[str, object]:
        return {"model": model, "tokenizer": str(tiny_tokenizer_dir), **more}

    return make
