"""An EngineCore that writes down what happens to it."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, override

import jaxllm
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchBucket, EnginePlan
from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core.disk_tier import DiskNews
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.clock import Clock, MonotonicClock
from jaxllm.engine.engine_core import Dispatched, EngineCore, StepFailed
from jaxllm.engine.executor import Executor, ModelRunnerOutput
from jaxllm.engine.latency_target import LatencyTarget
from jaxllm.journal.file import JournalWriter
from jaxllm.journal.records import Aborted, Added, Failed, Header, Heard, Waited, decided, fetched
from jaxllm.messages import EngineCoreRequest, StepOutputs

MAX_ERROR_CHARS = 500


def open_journal(
    path: Path,
    max_bytes: int,
    plan: EnginePlan,
    model: str,
    *,
    async_scheduling: bool,
    scheduling: SchedulingConfig | None = None,
    cache_key: bytes = b"",
) -> JournalWriter:
    """Raises ConfigError: the file cannot be made, or not begun in ``max_bytes``."""
    header = Header(
        plan=plan,
        async_scheduling=async_scheduling,
        scheduling=scheduling or SchedulingConfig(),
        jaxllm=jaxllm.__version__,
        model=model,
        wall_time=time.time(),
        clock=time.monotonic(),
        cache_key=cache_key if plan.kv_files else b"",
    )
    return JournalWriter(path, header, max_bytes)


def journal_of(config: EngineConfig, plan: EnginePlan, cache_key: bytes) -> JournalWriter | None:
    """What ``--journal`` asks for. Raises ConfigError as ``open_journal``."""
    if config.journal is None:
        return None
    return open_journal(
        Path(config.journal),
        config.journal_max_bytes,
        plan,
        config.model,
        async_scheduling=config.async_scheduling,
        scheduling=config.scheduling,
        cache_key=cache_key,
    )


class _NotedLimit(LatencyTarget):
    """A target that remembers which limit was last asked of it."""

    def __init__(self, target: LatencyTarget):
        self._target = target
        self.last: int | None = None

    @override
    def observe(self, bucket: BatchBucket, seconds: float) -> None:
        self._target.observe(bucket, seconds)

    @property
    @override
    def token_limit(self) -> int | None:
        self.last = self._target.token_limit
        return self.last


class JournaledCore(EngineCore):
    """Decisions are on file before the device gets them, results before they are acted upon: so
    the journal of an engine that died names the step that it died of.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        journal: JournalWriter,
        clock: Clock | None = None,
        latency_target: LatencyTarget | None = None,
        **options: Any,
    ):
        clock = clock or MonotonicClock()
        self._limit = None if latency_target is None else _NotedLimit(latency_target)
        super().__init__(scheduler, executor, clock=clock, latency_target=self._limit, **options)
        self._journal = journal
        self._now = clock.now
        self._turn_told = True

    @override
    def add_request(self, request: EngineCoreRequest) -> None:
        super().add_request(request)
        self._journal.write(Added(self._now(), request))

    @override
    def abort(self, request_ids: Iterable[str]) -> None:
        names = tuple(request_ids)
        self._journal.write(Aborted(self._now(), names))
        super().abort(names)

    @override
    def hear(self, news: DiskNews) -> None:
        self._journal.write(Heard(self._now(), news))
        super().hear(news)

    @override
    def step(self, meanwhile: Callable[[], object] | None = None) -> StepOutputs | None:
        self._turn_told = False
        outputs = super().step(meanwhile)
        self._tell_turn()
        return outputs

    @property
    def _last_limit(self) -> int | None:
        return None if self._limit is None else self._limit.last

    def _tell_turn(self) -> None:
        if not self._turn_told:
            self._turn_told = True
            self._journal.write(Waited(self._now(), self._last_limit))

    @override
    def _dispatch(self, step: SchedulerOutput) -> Dispatched:
        if self._journal.open:
            self._journal.write(decided(step, self.scheduler.plan, self._now(), self._last_limit))
        self._turn_told = True
        try:
            return super()._dispatch(step)
        except StepFailed as failure:
            self._tell_failure("dispatch", failure)
            raise

    @override
    def _fetch(self, due: Dispatched) -> ModelRunnerOutput:
        self._tell_turn()
        try:
            output = super()._fetch(due)
        except StepFailed as failure:
            self._tell_failure("fetch", failure)
            raise
        if self._journal.open:
            self._journal.write(fetched(output, self._now()))
        return output

    @override
    def close(self) -> None:
        try:
            super().close()
        finally:
            self._journal.close()

    def _tell_failure(self, where: str, failure: StepFailed) -> None:
        text = f"{type(failure.__cause__).__name__}: {failure.__cause__}"
        self._journal.write(Failed(self._now(), where, text[:MAX_ERROR_CHARS]))
