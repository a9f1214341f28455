"""Masks that the host fills: allowed_token_ids and bad_words. NumPy only, no JAX.

A mask for the next token needs the tokens before it on the host, so a step with such a row is
dispatched in two halves: the mask is filled while the forward half runs.
"""

from collections.abc import Sequence

import numpy as np


def mask_words(vocab_size: int) -> int:
    """int32 words per row; bit v % 32 of word v // 32 stands for token v."""
    return -(-vocab_size // 32)


class RowMask:
    """What one row may draw next, given the tokens it has drawn so far."""

    def __init__(
        self,
        vocab_size: int,
        allowed_token_ids: Sequence[int] | None,
        bad_words: Sequence[Sequence[int]],
    ):
        self._base = np.full(mask_words(vocab_size), -1, np.int32)
        if allowed_token_ids is not None:
            self._base[:] = 0
            ids = np.asarray(allowed_token_ids, np.int64)
            np.bitwise_or.at(self._base.view(np.uint32), ids >> 5, _bits(ids))
        self._bad_words = tuple(tuple(word) for word in bad_words)
        self._longest = max((len(word) for word in self._bad_words), default=1)
        self._tail: list[int] = []  # the last tokens, as many as the longest bad word needs

    def extend(self, token_ids: Sequence[int]) -> None:
        self._tail = [*self._tail, *token_ids][-self._longest :]

    def fill(self, out: np.ndarray) -> None:
        """Write this row's words into ``out`` (int32)."""
        out[:] = self._base
        words = out.view(np.uint32)
        for *prefix, last in self._bad_words:
            if not prefix or self._tail[-len(prefix) :] == prefix:
                words[last >> 5] &= ~_bits(np.asarray(last))


def _bits(ids: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32))
