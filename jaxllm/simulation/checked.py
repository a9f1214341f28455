"""The real engine core, with no bug hidden by its recovery, and an executor that counts again."""

from collections.abc import Callable
from typing import override

import numpy as np

from jaxllm.core import integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore, StepFailed
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.messages import StepOutputs
from jaxllm.simulation.fake_executor import DeviceError, FakeExecutor
from jaxllm.simulation.promises import Promises
from jaxllm.simulation.violation import require


class CheckedExecutor(FakeExecutor):
    """Recounts the scheduler's books at each dispatch, when the step is just made."""

    scheduler: Scheduler
    promises: Promises

    def watch(
        self, scheduler: Scheduler, last_limit: Callable[[], int | None] = lambda: None
    ) -> None:
        self.scheduler, self.promises = scheduler, Promises(scheduler, last_limit)
        self.failed_blocks: set[int] = set()  # of requests that the results just fetched end

    @override
    def dispatch(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        integrity.check_integrity(self.scheduler, plan)
        self.promises.check(plan)
        return super().dispatch(plan)

    @override
    def fetch(self, handle: ModelRunnerOutput | None) -> ModelRunnerOutput:
        output, rows = super().fetch(handle), self.scheduler.rows
        record = self.scheduler.in_flight[0]
        for tenancy in record.tenancies[~output.finite].tolist():
            for row in np.flatnonzero(rows.tenancy == tenancy).tolist():
                self.failed_blocks.update(self.scheduler.kv_cache.block_ids(rows.request[row]))
        return output

    def check_failed(self) -> None:
        """After an update: nobody finds what failed requests have computed."""
        found = self.failed_blocks & self.scheduler.kv_cache.prefix.block_ids()
        require(not found, "cache", f"Blocks {found} of a failed request are still found.")
        self.failed_blocks.clear()


class CheckedCore(EngineCore):
    """Recovers from the device's faults alone: what else makes a step fail is raised."""

    @override
    def _recover(self, lost: list[SchedulerOutput], failure: StepFailed) -> StepOutputs:
        if failure.__cause__ is not None and not isinstance(failure.__cause__, DeviceError):
            raise failure.__cause__
        return super()._recover(lost, failure)
