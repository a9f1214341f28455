"""96 tokens: printable ASCII, one character each, and an end. The vocabulary of the tiny engine."""

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

EOS = 95


class _Characters:
    eos_token_id = EOS
    bos_token_id = None
    tokens = (*(bytes((32 + i,)) for i in range(EOS)), b"<end>")
    special_token_ids = (EOS,)

    def __call__(self, text: bytes) -> list[int]:
        return [byte - 32 for byte in text]


def ascii_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Characters()), n_vocab=96, eos_token=[EOS])


def ids_of(text: str) -> list[int]:
    return [ord(char) - 32 for char in text]


def text_of(token_ids: Sequence[int]) -> str:
    """Without the end, if it is there."""
    ids = token_ids[:-1] if token_ids and token_ids[-1] == EOS else token_ids
    return "".join(chr(32 + i) for i in ids)


def regex(pattern: str) -> str:
    """A grammar as requests to the engine have it."""
    return LLMatcher.grammar_from_regex(pattern)
