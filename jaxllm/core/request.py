"""One request while the engine holds it. Mutable, and only the Scheduler changes it."""

from enum import Enum, auto

import numpy as np

from jaxllm.core.taps import first_owed
from jaxllm.messages import EngineCoreRequest


class RequestStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()  # waits again, with output already made
    FINISHED_STOPPED = auto()
    FINISHED_LENGTH = auto()
    FINISHED_ABORTED = auto()
    FINISHED_ERROR = auto()


FINISHED = {
    "stop": RequestStatus.FINISHED_STOPPED,
    "length": RequestStatus.FINISHED_LENGTH,
    "abort": RequestStatus.FINISHED_ABORTED,
    "error": RequestStatus.FINISHED_ERROR,
}


class Request:
    """What a request is and what is known of its output.

    How far its present row has computed is not here but in the RowTable: that ends with the row,
    while everything here survives a preemption.
    """

    __slots__ = (
        "arrival_index",
        "chain",
        "core_request",
        "has_fetched",
        "max_output_tokens",
        "num_cached_tokens",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_tapped",
        "output_token_ids",
        "request_id",
        "row",
        "status",
        "stop_ids",
    )

    def __init__(self, core_request: EngineCoreRequest, arrival_index: int, max_model_len: int):
        params = core_request.sampling_params
        self.core_request = core_request
        self.request_id = core_request.request_id
        self.arrival_index = arrival_index  # unique; a smaller one came earlier
        self.status = RequestStatus.WAITING
        self.output_token_ids: list[int] = []  # fetched from the device, all sent to the client
        self.row: int | None = None
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0  # prompt positions 1..this have been sent
        self.num_tapped = 0  # positions whose taps have been sent, or were not wanted
        self.num_cached_tokens: int | None = None  # of the prompt, when it was first admitted
        self.has_fetched = False  # since it waits: what was on file of it
        self.chain: list[bytes] = []  # of its full blocks so far; see KVCacheManager
        self.max_output_tokens = min(
            core_request.max_tokens, max_model_len - self.num_prompt_tokens
        )
        eos = () if params.ignore_eos else core_request.eos_token_ids
        self.stop_ids = frozenset((*eos, *(params.stop_token_ids or ())))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.core_request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens the host knows: prompt and fetched output."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.core_request.prompt_token_ids, *self.output_token_ids)

    def tokens_between(self, start: int, end: int) -> np.ndarray:
        """int32 [end - start]; without a look at the others."""
        prompt, split = self.core_request.prompt_token_ids, self.num_prompt_tokens
        output = self.output_token_ids[max(0, start - split) : max(0, end - split)]
        return np.array((*prompt[start:end], *output), np.int32)

    @property
    def final_len(self) -> int:
        """Tokens at the latest end; the last of them is sampled, but never fed."""
        return self.num_prompt_tokens + self.max_output_tokens

    @property
    def max_computed_tokens(self) -> int:
        """The most tokens whose keys and values are ever kept."""
        return max(self.num_prompt_tokens, self.final_len - 1)

    @property
    def finished(self) -> bool:
        return self.status in FINISHED.values()

    @property
    def owes_prompt_logprobs(self) -> bool:
        asked = self.core_request.sampling_params.prompt_logprobs is not None
        return asked and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def needs_events(self) -> bool:
        """Whether there is more to say of its steps than one plain token."""
        params = self.core_request.sampling_params
        wants_more = params.logprobs is not None or bool(params.taps)
        return wants_more or self.owes_prompt_logprobs or self.max_output_tokens == 0

    @property
    def num_skippable(self) -> int:
        """First tokens that need not be fed where their keys and values are there: all but the
        newest, since there is something to be sampled, and what is to be read on the way.
        """
        return min(self.num_tokens - 1, first_owed(self))

    def append(self, token_id: int) -> bool:
        """Take one output token. True if it may be the last; ``check_stop`` then decides."""
        output = self.output_token_ids
        output.append(token_id)
        return token_id in self.stop_ids or len(output) >= self.max_output_tokens
