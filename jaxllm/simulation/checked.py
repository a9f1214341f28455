"""The real engine core, with no bug hidden by its recovery, and an executor that counts again."""

from typing import override

from jaxllm.core import integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore, StepFailed
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.messages import StepOutputs
from jaxllm.simulation.fake_executor import DeviceError, FakeExecutor
from jaxllm.simulation.violation import require


class CheckedExecutor(FakeExecutor):
    """Recounts the scheduler's books at each dispatch, when the step is just made."""

    scheduler: Scheduler
    in_turns = True  # whether its policy is first come, first served

    @override
    def dispatch(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        integrity.check_integrity(self.scheduler, plan)
        self._check_turns(plan)
        return super().dispatch(plan)

    def _check_turns(self, step: SchedulerOutput) -> None:
        """Nobody is admitted before an older one, save suspects of a failure."""
        scheduler = self.scheduler
        if not self.in_turns or not step.new_rows or scheduler.isolating:
            return
        admitted = max(
            scheduler.requests[n.request.request_id].arrival_index for n in step.new_rows
        )
        oldest = min((request.arrival_index for request in scheduler.waiting), default=admitted)
        require(admitted <= oldest, "turns", "A request was admitted before an older one.")


class CheckedCore(EngineCore):
    """Recovers from the device's faults alone: what else makes a step fail is raised."""

    @override
    def _recover(self, lost: list[SchedulerOutput], failure: StepFailed) -> StepOutputs:
        if failure.__cause__ is not None and not isinstance(failure.__cause__, DeviceError):
            raise failure.__cause__
        return super()._recover(lost, failure)
