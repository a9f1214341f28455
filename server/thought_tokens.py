"""How many tokens of an answer are thoughts: as the parser that reads them sees it in the text."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from jaxllm.outputs import RequestOutput
from jaxllm.tokenizer.incremental import detokenizer
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.turns import Turns


class ThoughtTokens:
    """Of all choices of one request. A token that holds any character of thoughts counts, the
    markers around them do not: the same number whether the answer comes whole or in pieces.
    """

    def __init__(self, turns: Turns, tokenizer: Tokenizer):
        self._turns, self._tokenizer = turns, tokenizer
        self._texts: dict[int, _TokenText] = {}

    def add(self, output: RequestOutput) -> None:
        """``output`` brings only new tokens, or is the only one; its text is read afterwards."""
        for choice in output.outputs:
            if not self._turns.may_think(choice.index):
                continue
            text = self._texts.get(choice.index)
            if text is None:
                text = self._texts[choice.index] = _TokenText(
                    self._tokenizer, output.prompt_token_ids, self._turns.skips_special_tokens
                )
            text.add(choice.token_ids)

    def count(self) -> int:
        """So far."""
        return sum(
            text.tokens_in(self._turns.thoughts(index)) for index, text in self._texts.items()
        )


class _TokenText:
    """Where each token stands in the text."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skips_special: bool):
        self._detokenizer = detokenizer(tokenizer, prompt_token_ids, skips_special)
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, token_ids: list[int]) -> None:
        at = self._ends[-1] if self._ends else 0
        for token_id in token_ids:
            self._starts.append(at)
            at += len(self._detokenizer.add((token_id,)))
            self._ends.append(at)

    def tokens_in(self, spans: Iterable[tuple[int, int]]) -> int:
        """Tokens of which a character is in one of ``spans``, [start, end) and in order. A token
        that completes no character belongs to the next one.
        """
        count = last = 0
        for start, end in spans:
            first = min(bisect_right(self._ends, start), bisect_left(self._starts, start))
            first, last = max(first, last), bisect_left(self._starts, end)
            count += max(last - first, 0)
        return count
