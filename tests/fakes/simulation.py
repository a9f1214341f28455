"""A seeded run of the real scheduler and engine core against the fake executor.

Everything follows from the seed: plan, policy, arrivals, parameters, limits, aborts and faults.
"""

from dataclasses import dataclass, field
from random import Random

from jaxllm.config.plan import BatchBucket
from jaxllm.config.scheduling import POLICY_NAMES, SchedulingConfig
from jaxllm.core.integrity import check_integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.engine.latency_target import LatencyTarget
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import SamplingParams
from tests.fakes.answers import Answers
from tests.fakes.fake_executor import FakeExecutor
from tests.fakes.oracle import Answer, run_alone
from tests.fakes.plans import EOS, VOCAB_SIZE, make_plan


@dataclass
class Faults:
    """What goes wrong in a run. ``poison`` maps a request id to the context length that raises."""

    poison: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    transient: dict[int, str] = field(default_factory=dict)  # number of the dispatch -> where
    where: str = "fetch"

    def __call__(self, number: int, step: SchedulerOutput) -> str | None:
        ends = (step.starts + step.num_new_tokens).tolist()
        for request_id, end in zip(step.request_ids, ends, strict=True):
            if end >= self.poison.get(request_id, end + 1):
                return self.where
        return self.transient.get(number)


class CheckedExecutor(FakeExecutor):
    """Recounts the scheduler's books at each dispatch, when the step is just made."""

    scheduler: Scheduler

    def dispatch(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        if self.scheduler.requests:
            check_integrity(self.scheduler, plan)
        return super().dispatch(plan)


class RandomLimit(LatencyTarget):
    """Any limit at all is to be survived."""

    def __init__(self, random: Random, most: int):
        self.random, self.most = random, most

    def observe(self, bucket: BatchBucket, seconds: float) -> None:
        pass

    @property
    def token_limit(self) -> int:
        return self.random.randint(0, self.most)


class Simulation:
    def __init__(self, seed: int, *, num_requests: int = 14, faulty: bool = False):
        self.random = random = Random(seed)
        max_model_len, block_size = random.choice((12, 24, 40)), random.choice((1, 2, 4, 8))
        # Mostly little more than the longest request needs; at times less, then some are refused.
        longest = -(-max_model_len // block_size)
        self.plan = make_plan(
            max_model_len=max_model_len,
            max_num_seqs=random.choice((1, 3, 5, 8)),
            max_num_batched_tokens=random.choice((8, 9, 16, 64)),
            block_size=block_size,
            num_blocks=max(2, longest + random.choice((-1, 1, 2, 4, longest, 8 * longest))),
            prefix_caching=random.random() < 0.9,
            host_blocks=random.choice((0, 2, longest, 4 * longest)),
            offloading=random.random() < 0.5,
        )
        self.texts = [[random.randrange(VOCAB_SIZE) for _ in range(max_model_len)] for _ in "ab"]
        self.scheduling = SchedulingConfig(
            policy=random.choice(POLICY_NAMES),
            tenant_weights=("a=3", "b=0.5"),
            long_prefill_token_threshold=random.choice((None, 1, 5)),
        )
        self.scheduler = Scheduler(self.plan, self.scheduling)
        self.requests = [self._request(i) for i in range(num_requests)]
        self.faults = self._faults() if faulty else Faults()
        self.executor = CheckedExecutor(self.plan, self.faults, self.faults.not_finite)
        self.executor.scheduler = self.scheduler
        self.engine = EngineCore(
            self.scheduler,
            self.executor,
            async_scheduling=random.random() < 0.75,
            latency_target=RandomLimit(Random(seed), 70) if random.random() < 0.3 else None,
        )
        self.answers = Answers()
        self.accepted: list[EngineCoreRequest] = []
        self.aborted: set[str] = set()

    def _request(self, number: int) -> EngineCoreRequest:
        random, limit = self.random, self.plan.max_model_len
        prompt_len = random.randint(1, limit - 1)
        if random.random() < 0.5:
            prompt_len = min(prompt_len, 4)
        max_tokens = random.randint(0, limit - prompt_len)
        scored = max_tokens == 0 or random.random() < 0.2
        params = SamplingParams(
            seed=random.randrange(2**40),
            max_tokens=max_tokens,
            min_tokens=random.choice((0, 0, max_tokens // 2)),
            ignore_eos=random.random() < 0.6,
            stop_token_ids=random.choice(((), (), (5, 11))),
            logprobs=random.choice((None, None, 0, 3)),
            prompt_logprobs=random.choice((0, 2)) if scored else None,
        )
        return EngineCoreRequest(
            request_id=f"r{number}",
            prompt_token_ids=self._prompt(prompt_len),
            cache_salt=random.choice(("", "", "", "other")),
            sampling_params=params,
            max_tokens=max_tokens,
            eos_token_ids=(EOS, EOS + 1),
            priority=random.choice((-1, 0, 0, 7)),
            tenant=random.choice("abc"),
        )

    def _prompt(self, length: int) -> tuple[int, ...]:
        """Most begin like others, as with a system prompt or the turns of a conversation."""
        random = self.random
        common = random.choice(self.texts)[: random.choice((0, length // 2, length - 1, length))]
        return (*common, *(random.randrange(VOCAB_SIZE) for _ in range(length - len(common))))

    def _faults(self) -> Faults:
        random = self.random
        faults = Faults(where=random.choice(("dispatch", "fetch")))
        for request in random.sample(self.requests, 3):
            longest = len(request.prompt_token_ids) + request.max_tokens
            table = random.choice((faults.poison, faults.not_finite))
            table[request.request_id] = random.randint(1, longest)
        number = random.randrange(10)
        for _ in range(2):  # far apart, or an innocent request could fail alone twice
            faults.transient[number] = random.choice(("dispatch", "fetch"))
            number += 300
        return faults

    def run(self) -> None:
        """Run to the end and compare every answer with the request's own, run alone."""
        random, todo = self.random, list(self.requests)
        limit = 200 + 30 * sum(len(r.prompt_token_ids) + r.max_tokens for r in todo)
        steps = 0
        while todo or self.engine.has_work():
            while todo and random.random() < 0.3:
                self._add(todo.pop(0))
            if self.accepted and random.random() < 0.03:
                self._abort(random.choice(self.accepted).request_id)
            self.answers.take(self.engine.step())
            check_integrity(self.scheduler)
            steps += 1
            assert steps < limit, "no progress"
        self._check_end()

    def _add(self, request: EngineCoreRequest) -> None:
        try:
            self.engine.add_request(request)
        except InvalidRequestError:
            longest = len(request.prompt_token_ids) + max(request.max_tokens - 1, 0)
            room = (self.plan.num_blocks - 1) * self.plan.block_size
            assert longest > room, "a request that fits was refused"
            return
        self.accepted.append(request)
        self.answers.expect(request.request_id)

    def _abort(self, request_id: str) -> None:
        if self.answers.by_id[request_id].finish_reason is None:
            self.aborted.add(request_id)
        self.engine.abort([request_id, "unknown"])

    def _check_end(self) -> None:
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable
        assert self.scheduler.rows.num_running == 0
        if not (self.faults.poison or self.faults.transient):
            assert self.executor.num_resets == 0, "the executor raised"
        for request in self.accepted:
            expected = run_alone(request, VOCAB_SIZE)
            self._compare(request, self.answers.by_id[request.request_id], expected)

    def _compare(self, request: EngineCoreRequest, answer: Answer, expected: Answer) -> None:
        name = request.request_id
        if answer.finish_reason in ("abort", "error"):
            bad = name in self.faults.poison or name in self.faults.not_finite
            wanted = name in self.aborted if answer.finish_reason == "abort" else bad
            assert wanted, f"{name} ended with {answer.finish_reason}: {answer.error}"
            assert (answer.error is not None) == (answer.finish_reason == "error")
            n = len(answer.token_ids)
            assert answer.token_ids == expected.token_ids[:n], name
            assert answer.logprobs == expected.logprobs[:n], name
            p = len(answer.prompt_logprobs)
            assert answer.prompt_logprobs == expected.prompt_logprobs[:p], name
            return
        self._check_was_harmless(request, expected)
        assert answer == expected, name

    def _check_was_harmless(self, request: EngineCoreRequest, expected: Answer) -> None:
        """A request that ended well never reached the length from which it is bad."""
        reached = len(request.prompt_token_ids) + max(len(expected.token_ids) - 1, 0)
        for table in (self.faults.poison, self.faults.not_finite):
            assert reached < table.get(request.request_id, reached + 1), request.request_id
