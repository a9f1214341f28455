import pytest

from tests.fakes.tiny_engine import TinyEngine


@pytest.fixture(scope="session")
def engine() -> TinyEngine:
    return TinyEngine()
