"""A worker whose engine gives every request one token per step, at a steady pace.

``--model paced:MS`` makes a step every MS milliseconds; a late step is not caught up with. The
tokens are the prompt's, over and over.
"""

import sys
import time
from collections.abc import Iterable

from jaxllm.config.engine import EngineConfig
from jaxllm.messages import EngineCoreOutput, EngineCoreRequest, EngineStats, StepOutputs
from tests.frontend import fake_worker


class PacedCore:
    """Cheap enough to feed hundreds of streams from a part of one core."""

    def __init__(self, period_s: float):
        self.period_s = period_s
        self.requests: dict[str, EngineCoreRequest] = {}
        self.counts: dict[str, int] = {}
        self.num_steps = 0
        self._due = 0.0

    def close(self) -> None: ...

    def add_request(self, request: EngineCoreRequest) -> None:
        self.requests[request.request_id] = request
        self.counts[request.request_id] = 0

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)
            self.counts.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.requests), 0, 0.0, 0, self.num_steps)

    def step(self) -> StepOutputs:
        now = time.monotonic()
        if now < self._due:
            time.sleep(self._due - now)
        self._due = max(self._due, now) + self.period_s
        self.num_steps += 1
        out = StepOutputs(self.num_steps)
        for name, request in list(self.requests.items()):
            count = self.counts[name]
            token_id = request.prompt_token_ids[count % len(request.prompt_token_ids)]
            self.counts[name] = count + 1
            if count + 1 < request.max_tokens:
                out.request_ids.append(name)
                out.token_ids.append(token_id)
            else:
                out.events.append(EngineCoreOutput(name, (token_id,), "length"))
                self.abort((name,))
        return out


def build_engine(config: EngineConfig) -> fake_worker.FakeEngine:
    engine = _build_quick(config)
    engine.core = PacedCore(float(config.model.partition(":")[2]) / 1000)  # type: ignore[assignment]
    return engine


_build_quick = fake_worker.build_engine

if __name__ == "__main__":
    fake_worker.build_engine = build_engine
    sys.exit(fake_worker.main())
