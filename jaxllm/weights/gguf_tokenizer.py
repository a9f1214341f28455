"""tokenizer.json and its companions from GGUF metadata. Knows tokenizers, no weights, no config.

A GGUF file stores vocabulary and merges but only the *name* of the pre-tokenizer. The table below
holds the names whose exact rules are known; any other name is refused, because a wrong split
gives a model that is quietly worse on digits and spaces.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxllm.errors import CheckpointError
from jaxllm.weights.gguf_config import stop_token_ids
from jaxllm.weights.gguf_header import GGUFHeader

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@dataclass(frozen=True, slots=True)
class _Rules:
    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token as a whole is taken as it is (tiktoken)
    add_bos: bool = False  # when the file does not say


_GPT2 = _Rules(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False))
_LLAMA3 = _Rules(lambda: _split(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
_GLM4 = _Rules(lambda: _split(_LLAMA3_SPLIT), ignore_merges=True)

PRE_TOKENIZERS: dict[str, _Rules] = {
    "gpt-2": _GPT2,
    "smollm": _Rules(_digits_then_gpt2),
    "starcoder": _Rules(_digits_then_gpt2),
    "qwen2": _Rules(lambda: _split(_QWEN2_SPLIT), nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "glm4": _GLM4,
    "chatglm-bpe": _GLM4,
}


class _Vocabulary:
    """The lists under tokenizer.ggml, checked against each other."""

    def __init__(self, header: GGUFHeader):
        self.header = header
        kind = self.value("model", str)
        if kind != "gpt2":
            raise self.fail(
                f"its tokenizer is of kind {kind!r}; only byte-level BPE ('gpt2') is translated. "
                "Use the Hugging Face directory of this model"
            )
        tokens = self.strings("tokens")
        types = self.value("token_type", list, [1] * len(tokens))
        if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise self.fail(
                "its token list is empty, repeats a token, or does not match token_type"
            )
        while tokens and types[len(tokens) - 1] == _UNUSED:
            tokens.pop()  # rows that only pad the embedding
        self.tokens, self.types = tokens, types[: len(tokens)]
        self.merges = [self._merge(line) for line in self.strings("merges")]

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.header.path}: {reason}.")

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.header.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise self.fail(f"the metadata tokenizer.ggml.{key} is missing or no {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.value(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.fail(f"the metadata tokenizer.ggml.{key} must hold strings")
        return values

    def token(self, key: str) -> str | None:
        index = self.header.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            return None
        return self.tokens[index]

    def _merge(self, line: str) -> tuple[str, str]:
        left, space, right = line.partition(" ")
        if not left or not space or not right or " " in right:
            raise self.fail(f"the merge {line[:40]!r} does not name two tokens")
        return left, right

    def added_tokens(self) -> list[AddedToken]:
        return [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]


def _rules(vocabulary: _Vocabulary) -> _Rules:
    name = vocabulary.header.metadata.get("tokenizer.ggml.pre")
    rules = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rules is None:
        raise vocabulary.fail(
            f"its pre-tokenizer {name!r} is unknown (known: {', '.join(PRE_TOKENIZERS)}). "
            "Use the Hugging Face directory of this model, which holds its tokenizer.json"
        )
    return rules


def _build(vocabulary: _Vocabulary, rules: _Rules, add_bos: bool) -> Tokenizer:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        bpe = models.BPE(ids, vocabulary.merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the binding raises bare Exception
        raise vocabulary.fail(f"its merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(bpe)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rules.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(vocabulary.added_tokens())
    bos = vocabulary.token("bos_token_id")
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, ids[bos])]
        )
    return tokenizer


def tokenizer_files(header: GGUFHeader) -> dict[str, bytes]:
    """File name to content: tokenizer.json, tokenizer_config.json, generation_config.json.

    Raises CheckpointError when the tokenizer cannot be rebuilt exactly.
    """
    vocabulary = _Vocabulary(header)
    rules = _rules(vocabulary)
    add_bos = vocabulary.value("add_bos_token", bool, rules.add_bos)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.token(f"{theirs}_token_id")
        if token is not None:
            settings[f"{ours}_token"] = token
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    generation: dict[str, Any] = {"eos_token_id": stop_token_ids(header)}
    if isinstance(bos_id := header.metadata.get("tokenizer.ggml.bos_token_id"), int):
        generation["bos_token_id"] = bos_id
    tokenizer = _build(vocabulary, rules, add_bos)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }
