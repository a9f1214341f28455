"""A seeded run of the real scheduler and engine core against the fake executor.

Everything follows from the scenario and the seed: the plan, arrivals, parameters, aborts, faults.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from jaxllm.core import integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from jaxllm.simulation.answers import Answers
from jaxllm.simulation.checked import CheckedCore, CheckedExecutor
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.fake_files import Disk, FakeFiles
from jaxllm.simulation.faults import Faults
from jaxllm.simulation.hash_model import is_forced
from jaxllm.simulation.journaled import start_journaled
from jaxllm.simulation.oracle import Answer, run_alone
from jaxllm.simulation.plans import VOCAB_SIZE
from jaxllm.simulation.scenarios import SCENARIOS
from jaxllm.simulation.traffic import Traffic
from jaxllm.simulation.violation import Violation, require

STEPS_PER_TOKEN = 3  # of all open requests together, until a new one must have ended
STEPS_ANYWAY = 60
CLEAN_ENDS = 0.5  # share of deaths
CLIENTS_RETURN = 0.5  # share of those whose engine died
DUPLICATES = 0.01  # requests per step under a name in use
MAX_STEP_SECONDS = 0.02


@dataclass(slots=True)
class Open:
    """A request that has not ended."""

    request: EngineCoreRequest
    deadline: int  # step by which it must have
    aborted: bool = False


class Simulation:
    def __init__(self, scenario: str, seed: int):
        self.scenario = SCENARIOS[scenario]
        self.random = Random(f"{scenario} {seed}")
        self.plan = self.scenario.plan(self.random)
        self.clock = VirtualClock()
        self.traffic = Traffic(self.scenario, self.plan, self.random)
        self.num_steps = self.num_ended = self.num_deaths = 0
        self.num_preemptions = 0
        self.disk = Disk(self.random.choice((3, 12, 200)) if self.plan.kv_files else 0)
        self._start_engine()

    def _start_engine(self) -> None:
        self.faults = Faults(where=self.random.choice(("dispatch", "fetch")))
        self.scheduling = self.scenario.scheduling(self.random)
        self.scheduler = Scheduler(self.plan, self.scheduling)
        files = FakeFiles(self.disk, self.clock, self.random) if self.plan.kv_files else None
        self.executor = CheckedExecutor(self.plan, self.faults, self.faults.not_finite, files)
        limit = self.scenario.limit(self.random)
        self.executor.watch(self.scheduler, lambda: None if limit is None else limit.last)
        options: dict[str, Any] = {
            "async_scheduling": self.random.random() < 0.75,
            "clock": self.clock,
            "latency_target": limit,
            "files": files,
            "keep": self.executor.keep,
        }
        self._check_journal: Callable[[], None] = lambda: None
        if self.scenario.journals and self.random.random() < self.scenario.journals:
            started = start_journaled(self.scheduler, self.executor, **options)
            self.engine, self._check_journal = started
        else:
            self.engine = CheckedCore(self.scheduler, self.executor, **options)
        self.answers = Answers()
        self.open: dict[str, Open] = {}

    def run(self, num_steps: int) -> None:
        """Make so many steps, then finish what is open.

        Raises:
            Violation: an answer is not the request's own, comes twice, or does not come.
            InvariantError: the books do not add up.
        """
        random, scenario = self.random, self.scenario
        most = self.plan.max_num_seqs + scenario.backlog
        while self.num_steps < num_steps:
            if len(self.open) <= most and random.random() < scenario.arrivals:
                self._add(self.traffic.come())
            if self.open and random.random() < DUPLICATES:
                self._check_name(random.choice(list(self.open.values())).request)
            if self.open and random.random() < scenario.aborts:
                self._abort(random.choice(list(self.open)))
            if scenario.transient and random.random() < scenario.transient:
                self.faults.draw_passing(self.executor.num_dispatched, random)
            if scenario.deaths and random.random() < scenario.deaths:
                self._die()
            self._step()
        while self.engine.has_work():
            self._step()
        self._check_rest()

    def _step(self) -> None:
        self.clock.advance(self.random.random() * MAX_STEP_SECONDS)
        num_dispatched = self.executor.num_dispatched
        outputs = self.engine.step()
        self.executor.steps.clear()
        self.executor.check_failed()
        self.num_steps += 1
        for request_id in self.answers.take(outputs):
            self._end(request_id)
        if self.executor.num_dispatched == num_dispatched:  # which is when they are counted else
            integrity.check_integrity(self.scheduler)
        oldest = next(iter(self.open.values()), None)
        starves = self.scheduling.policy == "priority"
        if oldest is not None and not starves and self.num_steps > oldest.deadline:
            raise Violation("progress", f"{oldest.request.request_id} waits too long.")

    def _add(self, requests: list[EngineCoreRequest]) -> None:
        for request in requests:
            try:
                self.engine.add_request(request)
            except InvalidRequestError:
                self._check_refusal(request)
                continue
            if self.random.random() < self.scenario.bad:
                self.faults.draw_for(request, self.random)
            self.answers.expect(request.request_id)
            self.open[request.request_id] = Open(request, 0)
            tokens = sum(
                len(o.request.prompt_token_ids) + o.request.max_tokens for o in self.open.values()
            )
            wait = STEPS_ANYWAY + STEPS_PER_TOKEN * tokens
            deadline = self.num_steps + round(wait * self._patience(request.tenant))
            self.open[request.request_id].deadline = deadline

    def _patience(self, tenant: str) -> float:
        """How much longer a tenant's requests may take than if all were served in turn."""
        if self.scheduling.policy != "fair":
            return 1.0
        weights = self.scheduling.weight_by_tenant()
        total = sum(weights.get(name, 1.0) for name in set(self.scenario.tenants))
        return max(1.0, total / weights.get(tenant, 1.0))

    def _check_name(self, request: EngineCoreRequest) -> None:
        """A second request of the same name is refused, and harms nobody."""
        try:
            self.engine.add_request(request)
        except InvalidRequestError:
            return
        raise Violation("refusal", f"{request.request_id} runs twice.")

    def _check_refusal(self, request: EngineCoreRequest) -> None:
        longest = len(request.prompt_token_ids) + max(request.max_tokens - 1, 0)
        room = (self.plan.num_blocks - 1) * self.plan.block_size
        require(longest > room, "refusal", f"{request.request_id} fits, but was refused.")

    def _abort(self, request_id: str) -> None:
        self.open[request_id].aborted = True
        self.engine.abort([request_id, "unknown"])

    def _die(self) -> None:
        """The process is gone with all it held. Some clients ask the next one."""
        lost = [o.request for o in self.open.values()]
        if self.plan.kv_files and self.random.random() < CLEAN_ENDS:
            self.engine.close()
        self.num_deaths += 1
        self.num_preemptions += self.scheduler.num_preemptions
        self._check_journal()
        self._start_engine()
        self._add(
            [self.traffic.come_again(r) for r in lost if self.random.random() < CLIENTS_RETURN]
        )

    def _end(self, request_id: str) -> None:
        ended = self.open.pop(request_id)
        answer = self.answers.by_id.pop(request_id)
        self.num_ended += 1
        expected = run_alone(ended.request, VOCAB_SIZE)
        if answer.finish_reason in ("abort", "error"):
            self._check_cut_short(ended, answer, expected)
        else:
            reached = len(ended.request.prompt_token_ids) + max(len(expected.token_ids) - 1, 0)
            computed = not is_forced(ended.request)  # the last tokens need not be, if forced
            if computed and self.faults.reached(request_id, reached):
                raise Violation("answers", f"{request_id} ended well, but its logits were bad.")
            if answer != expected:
                raise Violation("answers", f"{request_id}: {answer}, but alone {expected}")
            self.traffic.remember(ended.request, answer.token_ids)
        self.faults.forget(request_id)

    def _check_cut_short(self, ended: Open, answer: Answer, expected: Answer) -> None:
        name, failed = ended.request.request_id, answer.finish_reason == "error"
        due = self.faults.is_bad(name) if failed else ended.aborted
        require(due, "stream", f"{name} ended with {answer.finish_reason}: {answer.error}")
        require((answer.error is not None) == failed, "stream", f"{name}: {answer.error}")
        for field in ("token_ids", "logprobs", "prompt_logprobs"):
            got = getattr(answer, field)
            begins = got == getattr(expected, field)[: len(got)]
            require(begins, "answers", f"{name}: {field} is not the beginning of its own.")

    def _check_rest(self) -> None:
        self._check_journal()
        self.num_preemptions += self.scheduler.num_preemptions
        integrity.check_integrity(self.scheduler)
        require(not self.open, "stream", f"{list(self.open)} never ended.")
        pool = self.scheduler.pool
        require(pool.num_free == pool.num_usable, "leak", "Blocks are in use at the end.")
        require(self.scheduler.rows.num_running == 0, "leak", "Rows are in use at the end.")
        if not self.faults.transient and not self.num_deaths and not self.scenario.bad:
            require(self.executor.num_resets == 0, "stream", "The executor was reset.")
