"""What is drawn under masks: grammars are told of it, and masks of the next step filled.

Where the next step is dispatched before the tokens are there, all this is done by a thread beside,
and the step after it scheduled and packed while llguidance fills, which holds no lock of Python's.
The masks are that thread's from ``follow_beside`` to the result.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.sampling.token_mask import RowMask, row_masks

# A run of forced tokens makes a mixed step of a decode step, for all rows, and saves its own row as
# many steps as it is long, but for the one under way. How much more a small mixed step costs:
LEAST_FORCED = 3
MIXED_COST = {"cpu": 1.5}

Forced = tuple[tuple[int, tuple[int, ...]], ...]  # as in ModelRunnerOutput


@dataclass(frozen=True)
class MaskedStep:
    """A step, and its masks by slot as it was dispatched: a row may change hands meanwhile."""

    plan: SchedulerOutput
    masks: list[tuple[int, RowMask]]
    scored: np.ndarray  # bool [n]: rows whose every token has its log-probability told
    num_slots: int

    @property
    def due(self) -> list[tuple[int, RowMask]]:
        """Masks for the token that is drawn there, not for one that is known by now."""
        positions = (self.plan.starts + self.plan.num_new_tokens).tolist()
        return [(slot, mask) for slot, mask in self.masks if mask.position == positions[slot]]


@dataclass(frozen=True)
class Followed:
    """A step's tokens, int32 [n], and what they leave no choice about."""

    token_ids: np.ndarray
    forced: Forced


class Masking:
    """Owner of the thread."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._beside = ThreadPoolExecutor(1, "masks")

    def fill(self, step: MaskedStep, begun: Callable[[], object] = lambda: None) -> np.ndarray:
        """int32 [slots, words]. ``begun`` is called when all is done that holds Python's lock."""
        return row_masks(step.due, step.num_slots, self._vocab_size, begun)

    def follow(self, step: MaskedStep, token_ids: np.ndarray) -> Forced:
        """Let masks know what was drawn. What they leave no choice about then, by entry."""
        dearer = MIXED_COST.get(jax.default_backend(), 0.1)
        least = LEAST_FORCED + int(dearer * token_ids.size)
        drawn, scored = token_ids.tolist(), step.scored.tolist()
        found: list[tuple[int, tuple[int, ...]]] = []
        for slot, mask in step.due:
            mask.extend((drawn[slot],))
            if not scored[slot] and (forced := mask.take_forced(least)):
                found.append((slot, forced))
        return tuple(found)

    def follow_beside(
        self, step: MaskedStep, token_ids: Any, after: MaskedStep
    ) -> tuple[Future[Followed], Future[np.ndarray]]:
        """Wait for a step's tokens, then ``follow`` them and ``fill`` the masks of the one
        ``after``. The tokens are told as soon as Python's lock is free.
        """
        told = Future[Followed]()

        def job() -> np.ndarray:
            try:
                drawn = np.asarray(token_ids)[: step.plan.rows.size]
                followed = Followed(drawn, self.follow(step, drawn))
                return self.fill(after, lambda: told.set_result(followed))
            except BaseException as error:
                if not told.done():
                    told.set_exception(error)
                raise

        return told, self._beside.submit(job)
