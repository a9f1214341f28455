"""A model's vocabulary as llguidance wants it."""

from collections.abc import Sequence

from llguidance import LLTokenizer

from jaxllm.errors import ConfigError
from jaxllm.tokenizer.tokenizer import Tokenizer


def load_ll_tokenizer(
    tokenizer_dir: str | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """``vocab_size`` is the width of the logits, ``eos_token_ids`` what may end an answer.

    Raises:
        ConfigError: no tokenizer, no end-of-sequence token, or a kind that llguidance cannot read.
    """
    if tokenizer_dir is None or not eos_token_ids:
        raise ConfigError("A grammar needs a tokenizer with an end-of-sequence token.")
    backend = Tokenizer.from_dir(tokenizer_dir).backend
    try:
        return LLTokenizer(backend.to_str(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:  # the library raises bare ones
        raise ConfigError(f"Grammars cannot use this model's tokenizer: {error}") from error
