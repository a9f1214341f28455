"""How much work is let in: what the engine runs at once, and a queue of a given length."""

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from jaxllm.errors import InvalidRequestError, QueueFullError
from jaxllm.frontend.client import Prompt
from jaxllm.sampling_params import SamplingParams

# Log-probabilities of prompts that one answer may hold: about a hundred megabytes of JSON.
MAX_SCORED = 2**21
BYTES_PER_TOKEN = 4  # of text that is not encoded yet; in the worst case each byte is a token
RETRY_AFTER_S = (1.0, 60.0)
_ENDS_REMEMBERED = 256


class AdmissionGate:
    """Counts sequences (prompts times ``n``) and their prompts' tokens between admission and end.

    Args:
        max_sequences: that run or wait.
        max_tokens: of the prompts of those.
        fair: once all is taken, a tenant with less than its equal part is still let in, so that one
            that floods the queue keeps nobody out. With n tenants up to 1 + 1/2 + ... + 1/n times
            as much is let in then.
    """

    def __init__(
        self,
        max_sequences: int,
        max_tokens: int,
        *,
        fair: bool = False,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.75, 1.25),
    ):
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._fair = fair
        self._sequences_of = Counter[str]()  # by tenant; who has none is not in it
        self._tokens_of = Counter[str]()
        self._clock = clock
        self._jitter = jitter
        self._ends: deque[tuple[float, int]] = deque(maxlen=_ENDS_REMEMBERED)  # time, sequences
        self.num_admitted = 0
        self.num_tokens = 0
        self.rejections = Counter(max_num_queued_reqs=0, max_num_queued_tokens=0)  # by the limit

    def check(self, num_sequences: int = 1, num_tokens: int = 1, tenant: str = "") -> None:
        """Whether so much more would be let in.

        A single request larger than the whole limit is, when it is alone: waiting would not help.

        Raises:
            QueueFullError: too many wait already, or too much.
        """
        too_many = self.num_admitted + num_sequences > self._max_sequences
        too_much = self.num_tokens + num_tokens > self._max_tokens
        if self._fair and (too_many or too_much):
            num_tenants = len(self._sequences_of.keys() | {tenant})
            sequences = self._sequences_of[tenant] + num_sequences
            too_many = sequences * num_tenants > self._max_sequences
            too_much = (self._tokens_of[tenant] + num_tokens) * num_tenants > self._max_tokens
        if self.num_admitted and (too_many or too_much):
            self.rejections["max_num_queued_reqs" if too_many else "max_num_queued_tokens"] += 1
            error = QueueFullError(
                "The server is overloaded: too many requests are waiting. Try again later."
            )
            error.retry_after_s = self._retry_after_s(num_sequences)
            raise error

    @contextmanager
    def admit(self, num_sequences: int, num_tokens: int = 0, tenant: str = "") -> Generator[None]:
        """Hold a place while the request runs. Raises QueueFullError."""
        self.check(num_sequences, num_tokens, tenant)
        self._hold(num_sequences, num_tokens, tenant)
        try:
            yield
        finally:
            self._hold(-num_sequences, -num_tokens, tenant)
            self._ends.append((self._clock(), num_sequences))

    def _hold(self, num_sequences: int, num_tokens: int, tenant: str) -> None:
        self.num_admitted += num_sequences
        self.num_tokens += num_tokens
        self._sequences_of[tenant] += num_sequences
        self._tokens_of[tenant] += num_tokens
        if not self._sequences_of[tenant]:
            del self._sequences_of[tenant], self._tokens_of[tenant]

    def _retry_after_s(self, num_sequences: int) -> float:
        """When a tenth of what is ahead will have ended, going by what ended lately. Not the same
        for everybody, so that those who were refused together do not come back together.
        """
        low, high = RETRY_AFTER_S
        seconds = low
        if self._ends:
            ended = sum(count for _, count in self._ends)
            per_second = ended / max(self._clock() - self._ends[0][0], 1e-3)
            seconds = max(num_sequences, self.num_admitted / 10) / per_second
        return min(max(seconds * self._jitter(), low), high)


def num_prompt_tokens(prompts: Sequence[Prompt]) -> int:
    """About how many tokens prompts have, without encoding them."""
    return sum(
        math.ceil(len(prompt.encode(errors="surrogatepass")) / BYTES_PER_TOKEN)
        if isinstance(prompt, str)
        else len(prompt)
        for prompt in prompts
    )


def check_scored(num_tokens: int, params: SamplingParams) -> None:
    """Raises InvalidRequestError for prompts whose log-probabilities would fill the memory."""
    if params.prompt_logprobs is None:
        return
    num_scored = num_tokens * params.n * (params.prompt_logprobs + 1)
    if num_scored > MAX_SCORED:
        raise InvalidRequestError(
            f"The prompts' log-probabilities would be about {num_scored} numbers; at most "
            f"{MAX_SCORED} are sent. Ask for fewer logprobs, a smaller n or fewer prompts.",
            param="prompt_logprobs",
            code="invalid_value",
        )
