"""The fake worker of tests/frontend, at ten tokens a second."""

import sys

from jaxllm.config.engine import EngineConfig
from tests.frontend import fake_worker

_build_quick = fake_worker.build_engine


def _build_slow(config: EngineConfig) -> fake_worker.FakeEngine:
    engine = _build_quick(config)
    engine.core.step_seconds = 0.1
    return engine


if __name__ == "__main__":
    fake_worker.build_engine = _build_slow
    sys.exit(fake_worker.main())
