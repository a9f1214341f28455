"""Log-probabilities in the forms of the two APIs. Knows outputs and bytes; knows no requests."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm.outputs import Logprob, PositionLogprobs
from jaxllm.tokenizer.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs],
    num_top: int,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat: for each token its string, bytes and alternatives."""

    def entry(token_id: int, scored: Logprob) -> dict[str, Any]:
        raw = tokenizer.token_to_bytes(token_id)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": max(scored.logprob, LOWEST),
            "bytes": list(raw),
        }

    content: list[dict[str, Any]] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        ranked = sorted(position.items(), key=lambda item: -item[1].logprob)[:num_top]
        top = [entry(other, scored) for other, scored in ranked]
        content.append(entry(token_id, position[token_id]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """``choices[].logprobs`` of one completion, in as many parts as its stream has.

    ``text_offset`` counts characters (code points): where in the text the token's first one is.
    """

    def __init__(self, tokenizer: Tokenizer, skipped_ids: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._skipped_ids = frozenset(skipped_ids)  # tokens that leave no text
        self._offset = 0

    def part(
        self,
        token_ids: Sequence[int],
        positions: Sequence[PositionLogprobs | None],
        echoed: str = "",
    ) -> dict[str, Any]:
        """A position None (a prompt's first token) has no log-probability. ``echoed``: a prompt as
        it was given, in which special tokens may be written out.
        """
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        for token_id, position in zip(token_ids, positions, strict=True):
            raw = self._tokenizer.token_to_bytes(token_id)
            tokens.append(_text(raw))
            text_offset.append(self._offset)
            written = bool(raw) and echoed.startswith(tokens[-1], self._offset)
            if written or token_id not in self._skipped_ids:
                self._offset += sum(byte & 0xC0 != 0x80 for byte in raw)
            if position is None:
                token_logprobs.append(None)
                top_logprobs.append(None)
                continue
            token_logprobs.append(max(position[token_id].logprob, LOWEST))
            top_logprobs.append(
                {
                    _text(self._tokenizer.token_to_bytes(other)): max(scored.logprob, LOWEST)
                    for other, scored in position.items()
                }
            )
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }


def prompt_logprobs(
    positions: Sequence[PositionLogprobs | None] | None,
) -> list[dict[str, Any] | None] | None:
    """vLLM's field: for each prompt token, token id -> log-probability, rank and text."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(scored.logprob, LOWEST),
                "rank": scored.rank,
                "decoded_token": scored.decoded_token,
            }
            for token_id, scored in position.items()
        }
        for position in positions
    ]


def _text(raw: bytes) -> str:
    """A part of a character is written as OpenAI does, so that different tokens stay different."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
