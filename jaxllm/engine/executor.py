"""The border between scheduling and computing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.messages import TapValue


@dataclass(frozen=True, slots=True)
class LogprobArrays:
    """Raw log-probabilities at n positions, host arrays."""

    token_logprobs: np.ndarray  # float32 [n], of the chosen token
    ranks: np.ndarray  # int32 [n], 1 is the most likely
    top_ids: np.ndarray  # int32 [n, L], most likely first; L = min(MAX_LOGPROBS, vocab_size)
    top_logprobs: np.ndarray  # float32 [n, L]


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """Results of one step, aligned with the rows of its SchedulerOutput."""

    step_id: int
    token_ids: np.ndarray  # int32 [n]; meaningless where the row does not sample
    # bool [n]; False: the row's logits held NaN or Inf, or no token was allowed: its request must
    # fail alone
    finite: np.ndarray
    logprobs: LogprobArrays | None = None  # None unless a scheduled row asked
    prompt_logprobs: LogprobArrays | None = None
    # prompt_logprobs covers all tokens of the step, in order of rows: entry t scores the token
    # *after* the t-th fed one, so the last entry of a chunk scores the first token of the next.
    num_token_slots: int = 0  # of the program that ran, padding included
    embeddings: np.ndarray | None = None  # float32 [n, E]; None unless a row's prompt ends here
    # (entry, token ids): the only ones that can follow what the entry's row has sampled. What the
    # row samples in a step dispatched before this is known is void: theirs is its place.
    forced: tuple[tuple[int, tuple[int, ...]], ...] = ()
    # By entry of the step's rows, in order of positions; of positions fed again, too.
    taps: Mapping[int, Sequence[TapValue]] = field(default_factory=dict[int, Sequence[TapValue]])


class Executor(Protocol):
    """Runs steps in the order they are dispatched. Implemented by ModelRunner and by the tests'
    fake.
    """

    def dispatch(self, plan: SchedulerOutput) -> Any:
        """Start the step, return a handle without waiting for it."""
        ...

    def fetch(self, handle: Any) -> ModelRunnerOutput:
        """Wait for the step. Raises whatever went wrong on the device; then call reset()."""
        ...

    def reset(self) -> None:
        """Forget all rows and start from an empty KV cache (after a failed step)."""
        ...
