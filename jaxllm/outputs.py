"""What a user gets back: text, token ids, log-probabilities. Names are vLLM's."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None  # 1 is the most likely token
    decoded_token: str | None = None


# token id -> Logprob, for one position; the chosen token is always among the keys
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class Tap:
    """What one of ``SamplingParams.taps`` read, at P positions of prompt and answer."""

    positions: list[int]
    values: np.ndarray  # float32 [P, hidden], [P, vocabulary], or [P, heads, keys] of attn_probs


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while running
    stop_reason: int | str | None = None  # the stop token or string that ended it; None for EOS
    taps: dict[str, Tap] | None = None  # by name; None where none were asked for

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When what happened to a request, in seconds; None: not yet.

    Those that end in ``_ts`` are moments on the engine's clock. The latencies are measured where
    the request came in, and count from there.
    """

    arrival_time: float  # on the clock of the latencies
    queued_ts: float | None = None
    scheduled_ts: float | None = None  # for the first time
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    first_token_latency: float | None = None
    num_generation_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        return _between(self.queued_ts, self.scheduled_ts)

    @property
    def prefill_time(self) -> float | None:
        return _between(self.scheduled_ts, self.first_token_ts)

    @property
    def decode_time(self) -> float | None:
        return _between(self.first_token_ts, self.last_token_ts)

    @property
    def inference_time(self) -> float | None:
        """Prefill and decode."""
        return _between(self.scheduled_ts, self.last_token_ts)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(slots=True)
class RequestOutput:
    """State of a request: whole, or only what is new, as ``SamplingParams.output_kind`` says."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # entry 0 is None
    num_cached_tokens: int = 0
    error: str | None = None
    embedding: bytes | None = None  # float32, little-endian: numpy.frombuffer(embedding, "<f4")
    metrics: RequestMetrics | None = None  # of AsyncLLM; changes while the request runs


@dataclass(slots=True)
class BeamSearchSequence:
    """One answer of a beam search. ``tokens`` begins with the prompt's, ``text`` with its text."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)  # one per generated token
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None  # "stop" | "length"
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The ``beam_width`` best answers to a prompt, best first."""

    sequences: list[BeamSearchSequence]
