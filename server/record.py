"""What is known of one HTTP request when it ends: for metrics, the access log and traces.

Holds nothing that a client wrote but the model's name and the trace's id; no prompt, answer or key.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import Request

from jaxllm.errors import JaxLLMError
from jaxllm.outputs import RequestMetrics, RequestOutput
from jaxllm.sampling_params import SamplingParams

ABORTED = "aborted"  # by the client's going or a deadline


@dataclass(slots=True)
class PromptRecord:
    """One prompt of the request, and what came of it."""

    num_prompt_tokens: int
    num_cached_tokens: int
    metrics: RequestMetrics | None
    finish_reasons: dict[int, str] = field(default_factory=dict)  # by completion


@dataclass(slots=True)
class RequestRecord:
    """Filled by the middleware and by ``Serving.generate``."""

    request_id: str
    method: str  # of a closed set, as the two below
    route: str
    status: int = 0  # 0 until it ends; 499 where the client had gone
    tenant: str = ""
    model: str | None = None
    params: SamplingParams | None = None
    traceparent: str = ""
    tracestate: str = ""
    started_ns: int = field(default_factory=time.time_ns)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    error: str | None = None  # the code of what ended generating
    prompts: dict[int, PromptRecord] = field(default_factory=dict)

    def add(self, index: int, output: RequestOutput) -> None:
        """An output of prompt ``index``."""
        prompt = self.prompts.get(index)
        if prompt is None:
            count = len(output.prompt_token_ids)
            prompt = PromptRecord(count, output.num_cached_tokens, output.metrics)
            self.prompts[index] = prompt
        prompt.num_cached_tokens = output.num_cached_tokens
        prompt.metrics = output.metrics
        for completion in output.outputs:
            if completion.finish_reason is not None:
                prompt.finish_reasons[completion.index] = completion.finish_reason

    @contextmanager
    def generating(self) -> Generator[None]:
        """Notes what ends it early: the code of an error, or that nobody waits for it any more."""
        try:
            yield
        except Exception as error:
            code = error.code if isinstance(error, JaxLLMError) else None
            self.error = code or JaxLLMError.code
            raise
        except BaseException:
            self.error = ABORTED
            raise

    def finish(self) -> None:
        self.seconds = time.monotonic() - self.started

    @property
    def num_prompt_tokens(self) -> int:
        return sum(prompt.num_prompt_tokens for prompt in self.prompts.values())

    @property
    def num_cached_tokens(self) -> int:
        return sum(prompt.num_cached_tokens for prompt in self.prompts.values())

    @property
    def num_output_tokens(self) -> int:
        return sum(metrics.num_generation_tokens for metrics in self.metrics)

    @property
    def finish_reasons(self) -> list[str]:
        return [reason for p in self.prompts.values() for reason in p.finish_reasons.values()]

    @property
    def metrics(self) -> list[RequestMetrics]:
        return [prompt.metrics for prompt in self.prompts.values() if prompt.metrics is not None]

    def longest(self, name: str) -> float | None:
        """Of several prompts' ``queue_time``, ``prefill_time``, ...: the largest, in seconds."""
        values = [getattr(metrics, name) for metrics in self.metrics]
        return max((value for value in values if value is not None), default=None)


def record_of(request: Request) -> RequestRecord:
    """The request's record; by now it is known whose request it is."""
    record: RequestRecord = request.scope["state"]["record"]
    record.tenant = request.scope["state"].get("tenant", "")
    return record
