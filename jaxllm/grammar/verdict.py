"""What goes to and fro between ``GrammarChecker`` and its processes."""

import msgspec


class CheckerSetup(msgspec.Struct, frozen=True):
    """The first message: for which model. Arguments of ``load_ll_tokenizer``."""

    tokenizer_dir: str | None
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_seconds: float  # of CPU time for one grammar


class CheckerReady(msgspec.Struct, frozen=True):
    error: str | None = None  # why nothing can be checked for this model


class Verdict(msgspec.Struct, frozen=True):
    """``grammar`` in llguidance's form, or the reason why there is none."""

    grammar: str = ""
    error: str | None = None
