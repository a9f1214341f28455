"""Text about as long as given token ids, for endpoints that take no ids and without a tokenizer."""

from collections.abc import Sequence

# Each is one token, with the space before it, in every common English vocabulary.
_LINES = (
    "the of and to in is was for on that by with from at his it an were are which this be has had",
    "first one their its new after but who not they have her she two been other when there all",
    "time into more only some could these then than now may work made over such where our most",
    "year day way part long world school still found life between never state great water last",
    "use again place around small home under number house right high every group book city river",
)
WORDS = tuple(word for line in _LINES for word in line.split())


def text_of(token_ids: Sequence[int]) -> str:
    """One word per id; the same ids give the same text, ids that differ mostly other words."""
    return " ".join(WORDS[token_id % len(WORDS)] for token_id in token_ids)
