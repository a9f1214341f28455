"""One engine with random weights for the room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm import LLM
from tests.grammar.rounds import open_llm


@pytest.fixture(scope="package")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with open_llm(tiny_model_dir) as llm:
        yield llm
