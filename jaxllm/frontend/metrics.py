"""Counts and times of all requests, as the text side sees them. Knows nobody who shows them.

Times inside the engine are by the engine's clock, taken once per step; latencies that users feel
are measured here. What happens per token is a look-up and a few assignments: gaps between tokens
are collected per step, and in a step most are the same.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from jaxllm.frontend.histogram import Histogram, bounds_1_2_5
from jaxllm.messages import EngineCoreRequest, StepOutputs
from jaxllm.outputs import RequestMetrics

FINISH_REASONS = ("stop", "length", "abort", "error")

# Bounds are vLLM's, so that its dashboards and alerts fit.
# fmt: off
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
           10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
            10.0, 20.0, 40.0, 80.0)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
              120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
# fmt: on
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)


class EngineMetrics:
    """Each of the ``n`` completions of a request counts as one, as in vLLM; what is about a whole
    request says so. Only requests that ran to their end enter the histograms of requests.
    """

    def __init__(self, max_model_len: int, clock: Callable[[], float] = time.monotonic):
        tokens = bounds_1_2_5(max_model_len)
        self.clock = clock
        self.num_prompt_tokens = 0  # of prompts whose prefill is done
        self.num_cached_tokens = 0  # of these, found in the prefix cache
        self.num_generation_tokens = 0
        self.num_engine_deaths = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.time_to_first_token = Histogram(_TTFT_S)
        self.inter_token_latency = Histogram(_TOKEN_S)
        self.time_per_output_token = Histogram(_TOKEN_S)
        self.e2e_latency = Histogram(_REQUEST_S)
        self.queue_time = Histogram(_REQUEST_S)
        self.prefill_time = Histogram(_REQUEST_S)
        self.decode_time = Histogram(_REQUEST_S)
        self.inference_time = Histogram(_REQUEST_S)
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.prompt_tokens = Histogram(tokens)
        self.generation_tokens = Histogram(tokens)
        self.max_generation_tokens = Histogram(tokens)  # of whole requests: their longest
        self.params_n = Histogram(_N)  # of whole requests
        self.params_max_tokens = Histogram(tokens)
        self._running: dict[str, tuple[RequestMetrics, EngineCoreRequest]] = {}

    def add(
        self, children: Sequence[EngineCoreRequest], arrival_time: float
    ) -> tuple[RequestMetrics, ...]:
        """A request begins; one record per completion, kept up to date until ``end``."""
        records = tuple(RequestMetrics(arrival_time) for _ in children)
        for child, record in zip(children, records, strict=True):
            self._running[child.request_id] = record, child
        return records

    def step(self, step: StepOutputs) -> None:
        """Take in what the engine says. Requests that are not known have ended."""
        for admission in step.admitted:
            if admission.request_id in self._running:
                record, _ = self._running[admission.request_id]
                record.queued_ts = admission.queued_ts
                record.scheduled_ts = admission.scheduled_ts
        for num_tokens in step.num_step_tokens:
            self.step_tokens.observe(num_tokens)
        now = step.timestamp
        gaps: dict[float, int] = {}
        for request_id in step.request_ids:
            self._add_tokens(request_id, 1, now, gaps)
        for output in step.events:
            if output.new_token_ids:
                self._add_tokens(output.request_id, len(output.new_token_ids), now, gaps)
        for gap, count in gaps.items():
            self.inter_token_latency.observe(gap, count)

    def _add_tokens(self, request_id: str, count: int, now: float, gaps: dict[float, int]) -> None:
        entry = self._running.get(request_id)
        if entry is None:
            return
        record, request = entry
        if record.last_token_ts is None:
            record.first_token_ts = now
            record.first_token_latency = self.clock() - record.arrival_time
            self.time_to_first_token.observe(record.first_token_latency)
            self.num_prompt_tokens += len(request.prompt_token_ids)
        else:
            gap = now - record.last_token_ts
            gaps[gap] = gaps.get(gap, 0) + 1
        record.last_token_ts = now
        record.num_generation_tokens += count
        self.num_generation_tokens += count

    def end(
        self,
        children: Sequence[EngineCoreRequest],
        reasons: Sequence[str],
        num_cached_tokens: int = 0,
    ) -> None:
        """A request ends: with what finish_reason, by completion."""
        whole = all(reason in ("stop", "length") for reason in reasons)
        longest = 0
        for child, reason in zip(children, reasons, strict=True):
            record, _ = self._running.pop(child.request_id)
            self.finished[reason] += 1
            if reason in ("stop", "length"):
                self._observe(record, child)
            longest = max(longest, record.num_generation_tokens)
        if whole:
            self.num_cached_tokens += num_cached_tokens
            self.params_n.observe(len(children))
            self.max_generation_tokens.observe(longest)

    def _observe(self, record: RequestMetrics, request: EngineCoreRequest) -> None:
        num_prompt_tokens, num_tokens = len(request.prompt_token_ids), record.num_generation_tokens
        if record.first_token_ts is None:
            self.num_prompt_tokens += num_prompt_tokens  # it was to have no tokens
        self.e2e_latency.observe(self.clock() - record.arrival_time)
        for histogram, seconds in (
            (self.queue_time, record.queue_time),
            (self.prefill_time, record.prefill_time),
            (self.decode_time, record.decode_time),
            (self.inference_time, record.inference_time),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        if num_tokens > 1 and record.decode_time is not None:
            self.time_per_output_token.observe(record.decode_time / (num_tokens - 1))
        self.prompt_tokens.observe(num_prompt_tokens)
        self.generation_tokens.observe(num_tokens)
        if request.sampling_params.max_tokens is not None:
            self.params_max_tokens.observe(request.sampling_params.max_tokens)


def merged(records: Sequence[RequestMetrics]) -> RequestMetrics:
    """Of a whole request: from the first of its completions that got so far to the last. The only
    one of a request stays itself, and so up to date.
    """
    if len(records) == 1:
        return records[0]

    def known(name: str) -> list[float]:
        values = (getattr(record, name) for record in records)
        return [value for value in values if value is not None]

    return RequestMetrics(
        arrival_time=records[0].arrival_time,
        queued_ts=min(known("queued_ts"), default=None),
        scheduled_ts=min(known("scheduled_ts"), default=None),
        first_token_ts=min(known("first_token_ts"), default=None),
        last_token_ts=max(known("last_token_ts"), default=None),
        first_token_latency=min(known("first_token_latency"), default=None),
        num_generation_tokens=sum(record.num_generation_tokens for record in records),
    )
