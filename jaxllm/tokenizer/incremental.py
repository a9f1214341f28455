"""Token ids in, text out, piece by piece: never half a character, in time linear in the tokens."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from jaxllm.tokenizer.tokenizer import Tokenizer

_PRIMING_TOKENS = 6  # enough prompt for a decoder to know that it is not at the start of the text
_MAX_HELD_TOKENS = 16  # no character takes more; beyond it the bytes are simply not UTF-8
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer(Protocol):
    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty. Never ends inside a character."""
        ...

    def flush(self) -> str:
        """What was held back, with U+FFFD for broken bytes. Nothing may be added afterwards."""
        ...


def detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> IncrementalDetokenizer:
    """The detokenizer for the text that follows ``prompt_token_ids``.

    For a prompt that ends between two characters, all pieces joined are
    ``decode(prompt + ids)`` without its ``decode(prompt)``.
    """
    tail = prompt_token_ids[-_PRIMING_TOKENS:]
    if tokenizer.token_bytes.exact:
        return _ByteDetokenizer(tokenizer, tail, skip_special_tokens)
    return _WindowDetokenizer(tokenizer, tail, skip_special_tokens)


class _ByteDetokenizer:
    """For byte-level vocabularies: a table look-up and a UTF-8 decoder that keeps its place."""

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool):
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.add(tail)

    def add(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1:  # every decode step
            (token_id,) = token_ids
            return "" if token_id in self._skipped else self._decoder.decode(self._bytes[token_id])
        kept = (self._bytes[token_id] for token_id in token_ids if token_id not in self._skipped)
        return self._decoder.decode(b"".join(kept))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For any other decoder: decodes a short window twice, with and without the new tokens.

    The window starts with tokens whose text is already out, because decoders treat the start of
    a text specially (SentencePiece drops its first space).
    """

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._known = self._kept(tail)  # text of these is out
        self._held: list[int] = []  # text of these is not
        self._known_text = tokenizer.decode(self._known, False)

    def add(self, token_ids: Sequence[int]) -> str:
        pieces: list[str] = []
        for token_id in self._kept(token_ids):
            self._held.append(token_id)
            window = self._decode(self._known + self._held)
            if window.endswith(_BROKEN) and len(self._held) < _MAX_HELD_TOKENS:
                continue
            pieces.append(self._advance(window))
        return "".join(pieces)

    def flush(self) -> str:
        return self._advance(self._decode(self._known + self._held)) if self._held else ""

    def _advance(self, window: str) -> str:
        text = window[len(self._known_text) :]
        self._known, self._held = self._held, []
        self._known_text = self._decode(self._known)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, False)

    def _kept(self, token_ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id not in self._skipped]
