"""What goes wrong on the device, and when: an executor's ``Fault``."""

from dataclasses import dataclass, field
from random import Random

from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.messages import EngineCoreRequest

MIN_GAP = (
    300  # dispatches between passing faults: nearer, an innocent request could fail alone twice
)


@dataclass
class Faults:
    """``poison`` and ``not_finite`` map a request id to the context length that raises, or from
    which its logits are NaN. ``transient`` maps the number of a dispatch to where it raises.
    """

    poison: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    transient: dict[int, str] = field(default_factory=dict)
    where: str = "fetch"

    def __call__(self, number: int, step: SchedulerOutput) -> str | None:
        if self.poison:
            ends = (step.starts + step.num_new_tokens).tolist()
            for request_id, end in zip(step.request_ids, ends, strict=True):
                if end >= self.poison.get(request_id, end + 1):
                    return self.where
        return self.transient.get(number)

    def draw_for(self, request: EngineCoreRequest, random: Random) -> None:
        """Let the request be bad at some length, which it may or may not reach."""
        length = random.randint(1, len(request.prompt_token_ids) + request.max_tokens)
        random.choice((self.poison, self.not_finite))[request.request_id] = length

    def draw_passing(self, num_dispatched: int, random: Random) -> None:
        """One fault soon, unless the last one was a short while ago."""
        if num_dispatched >= max(self.transient, default=-MIN_GAP) + MIN_GAP:
            where = random.choice(("dispatch", "fetch"))
            self.transient[num_dispatched + random.randrange(20)] = where

    def is_bad(self, request_id: str) -> bool:
        return request_id in self.poison or request_id in self.not_finite

    def reached(self, request_id: str, length: int) -> bool:
        """Whether a request that computed so many tokens should have failed."""
        first = min(t.get(request_id, length + 1) for t in (self.poison, self.not_finite))
        return length >= first

    def forget(self, request_id: str) -> None:
        self.poison.pop(request_id, None)
        self.not_finite.pop(request_id, None)
