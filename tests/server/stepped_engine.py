"""AsyncLLM over a real EngineCore and the fake executor, in this thread, stepping when told."""

import queue
from pathlib import Path
from typing import Any

from jaxllm.async_llm import AsyncLLM
from jaxllm.config.engine import EngineConfig
from jaxllm.core.integrity import check_integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import EngineDeadError
from jaxllm.messages import EngineCoreRequest, EngineStats, ModelInfo, StepOutputs, ToEngine
from jaxllm.simulation.fake_executor import FakeExecutor
from jaxllm.worker.serve_loop import ServeLoop
from tests.fakes.plans import make_plan

VOCAB_SIZE = 258  # of the tiny tokenizer


class SteppedEngine:
    """Stands where EngineProcess does. ``step`` is one turn of the worker's real loop."""

    def __init__(
        self, llm: AsyncLLM, tokenizer_dir: Path, eos_token_ids: tuple[int, ...] = (), **plan: Any
    ):
        self.plan = make_plan(vocab_size=VOCAB_SIZE, **plan)
        self.scheduler = Scheduler(self.plan)
        self.executor = FakeExecutor(self.plan)
        self.core = EngineCore(self.scheduler, self.executor)
        self.info = ModelInfo(
            "fake", str(tokenizer_dir), self.plan.max_model_len, VOCAB_SIZE, eos_token_ids
        )
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.received: list[EngineCoreRequest] = []
        self.stats: EngineStats | None = None
        self.num_told = 0  # steps that had something to tell
        self.ready, self.unready_because = True, None
        self._llm = llm
        self._loop = ServeLoop(self.core, self.inbox, self._deliver)
        self._num_blocks_at_rest = self.scheduler.pool.num_free

    async def start(self) -> ModelInfo:
        return self.info

    async def stop(self, grace_s: float = 0.0) -> None:
        self.ready = False

    def death(self) -> EngineDeadError:
        return EngineDeadError("It has been stopped.")

    def send(self, message: ToEngine) -> None:
        self.inbox.put(message)
        if isinstance(message, EngineCoreRequest):
            self.received.append(message)

    @property
    def busy(self) -> bool:
        return self.core.has_work() or not self.inbox.empty()

    def step(self) -> None:
        """Counts its books again afterwards."""
        assert self.busy
        self._loop.turn()
        check_integrity(self.scheduler)

    def step_until_told(self) -> None:
        """Until a step has something to tell."""
        before = self.num_told
        while self.num_told == before:
            self.step()

    @property
    def at_rest(self) -> bool:
        """Nothing runs or waits, and every block is free."""
        return (
            not self.scheduler.requests and self.scheduler.pool.num_free == self._num_blocks_at_rest
        )

    def _deliver(self, message: StepOutputs | EngineStats) -> None:
        if isinstance(message, EngineStats):
            self.stats = message
        else:
            self.num_told += 1
            self._llm._on_outputs(message)


async def stepped_llm(tokenizer_dir: Path, **plan: Any) -> tuple[AsyncLLM, SteppedEngine]:
    llm = AsyncLLM(EngineConfig(model="fake", tokenizer=str(tokenizer_dir)))
    engine = SteppedEngine(llm, tokenizer_dir, **plan)
    llm._engine = engine  # type: ignore[assignment]
    await llm.start()
    return llm, engine
