"""How prefills share the tokens of a step, so that short prompts need not wait for long ones."""

from collections.abc import Iterable
from dataclasses import dataclass


def wanted_tokens(
    prefills: Iterable[int], num_decode: int, most: int, threshold: int
) -> tuple[int, int]:
    """Tokens that a step's rows want, and those of them that short prefills do. Counts no further
    than matters where a step feeds ``most``."""
    wanted, short = num_decode, 0
    for num_tokens in prefills:
        wanted += num_tokens
        short += num_tokens if num_tokens <= threshold else 1  # to begin with
        if wanted >= most <= 2 * short:
            break
    return wanted, short


@dataclass(slots=True)
class PrefillShares:
    """Tokens of a step's prefills, taken in the order in which the requests have their turn.

    Short prefills take what they want. Long ones leave them room, up to half of the step; what
    then nobody wants is theirs.
    """

    left: int  # tokens that nobody has taken
    threshold: int  # a prefill with more tokens to go is long
    left_for_long: int

    @classmethod
    def of(cls, budget: int, threshold: int, wanted_by_short: int) -> "PrefillShares":
        return cls(budget, threshold, budget - min(wanted_by_short, budget // 2))

    def take(self, num_tokens: int, at_least: int = 0) -> int:
        """A chunk of a prefill that has ``num_tokens`` to go."""
        if num_tokens <= self.threshold:
            chunk = min(num_tokens, self.left)
        else:
            chunk = min(num_tokens, self.left, max(self.left_for_long, at_least))
            self.left_for_long -= chunk
        self.left -= chunk
        return chunk

    def take_rest(self, num_tokens: int) -> int:
        """More for a prefill that has ``num_tokens`` to go, after all had their turn."""
        chunk = min(num_tokens, self.left)
        self.left -= chunk
        return chunk
