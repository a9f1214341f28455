"""Tokenizers rebuilt from GGUF: how each pre-tokenizer splits digits, spaces and case."""

import json
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from jaxllm.errors import CheckpointError
from jaxllm.weights.gguf_header import GGUFHeader
from jaxllm.weights.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from tests.weights.conftest import BOS, EOS, TOKENS, TOOL, WriteGGUF

WIDE = "\uff11\uff12\uff13"  # full-width digits
PROBES = ["a  1 b   22", "x\n\n 7", WIDE + " ²"]
LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def letters(text: str) -> str:
    """``text`` in byte-level letters."""
    return LETTERS.pre_tokenize_str(text)[0][0] if text else ""


def build(write_gguf: WriteGGUF, pre: str | None, **options: Any) -> Tokenizer:
    files = tokenizer_files(GGUFHeader(write_gguf(pre=pre, **options)))
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    assert tokenizer.pre_tokenizer is not None
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", PROBES[0], ["a", "  ", "1", " b", "   ", "2", "2"]),
        ("smollm", PROBES[1], ["x", "\n\n ", "7"]),
        ("smollm", PROBES[2], [*WIDE, " ", "²"]),
        ("gpt-2", PROBES[0], ["a", " ", " 1", " b", "  ", " 22"]),
        ("gpt-2", PROBES[1], ["x", "\n\n", " 7"]),
        ("gpt-2", PROBES[2], [WIDE, " ²"]),
        ("qwen2", PROBES[0], ["a", " ", " ", "1", " b", "  ", " ", "2", "2"]),
        ("qwen2", PROBES[1], ["x", "\n\n", " ", "7"]),
        ("qwen2", PROBES[2], [*WIDE, " ", "²"]),
        ("llama-bpe", PROBES[0], ["a", " ", " ", "1", " b", "  ", " ", "22"]),
        ("llama-bpe", PROBES[1], ["x", "\n\n", " ", "7"]),
        ("llama-bpe", "12345 I'LL", ["123", "45", " I", "'LL"]),
        ("glm4", "12345 we'Re", ["123", "45", " we", "'Re"]),
    ],
)
def test_splits(write_gguf: WriteGGUF, pre: str, text: str, expected: list[str]) -> None:
    tokenizer = build(write_gguf, pre)
    assert pieces(tokenizer, text) == [letters(piece) for piece in expected]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_tokenizer_gives_the_text_back(write_gguf: WriteGGUF, pre: str) -> None:
    tokenizer = build(write_gguf, pre)
    for text in [*PROBES, "naïve 🎉 e\u0301", "<|begin|>hi<|end|> <tool>"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = "naïve 🎉 é" if pre == "qwen2" and "\u0301" in text else text
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_merges_and_special_tokens(write_gguf: WriteGGUF) -> None:
    tokenizer = build(write_gguf, "smollm")
    encoded = tokenizer.encode("<|begin|>11  <|end|><tool>")
    assert encoded.tokens == ["<|begin|>", "1", "1", "ĠĠ", "<|end|>", "<tool>"]
    assert encoded.ids[0] == BOS and encoded.ids[-2:] == [EOS, TOOL]
    assert build(write_gguf, "gpt-2").encode("11").tokens == ["11"]
    kinds = {
        token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()
    }
    assert kinds == {"<|begin|>": True, "<|end|>": True, "<tool>": False}


def test_bos_is_added_where_the_model_wants_it(write_gguf: WriteGGUF) -> None:
    assert build(write_gguf, "llama-bpe").encode("a").ids[0] == BOS
    assert build(write_gguf, "smollm").encode("a").ids[0] != BOS
    told = build(write_gguf, "smollm", extra=lambda writer: writer.add_add_bos_token(True))
    assert told.encode("a").ids[0] == BOS


def test_settings(write_gguf: WriteGGUF) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(TOOL)

    files = tokenizer_files(GGUFHeader(write_gguf(extra=extra)))
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["bos_token"] == "<|begin|>" and settings["eos_token"] == "<|end|>"
    assert settings["chat_template"] == "{{ messages }}"
    generation = json.loads(files["generation_config.json"])
    assert generation == {"eos_token_id": [EOS, TOOL], "bos_token_id": BOS}


def test_padding_rows_are_no_tokens(write_gguf: WriteGGUF) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        for key in ("tokens", "token_type"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        writer.add_token_list([*TOKENS, "[PAD0]", "[PAD1]"])
        writer.add_token_types([1] * len(TOKENS) + [5, 5])

    assert build(write_gguf, "smollm", extra=extra).get_vocab_size() == len(TOKENS)


@pytest.mark.parametrize("pre", ["default", "deepseek-coder", "", None])
def test_unknown_pre_tokenizer_is_refused(write_gguf: WriteGGUF, pre: str | None) -> None:
    with pytest.raises(CheckpointError, match="pre-tokenizer"):
        build(write_gguf, pre)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tokens", ["a", "a"], "repeats"),
        ("token_type", [1], "does not match"),
        ("merges", ["no-space"], "two tokens"),
        ("merges", ["a b c"], "two tokens"),
        ("merges", ["ghost token"], "do not fit"),
        ("model", "llama", "byte-level BPE"),
    ],
)
def test_hostile_vocabulary(write_gguf: WriteGGUF, key: str, value: Any, reason: str) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_string(f"tokenizer.ggml.{key}", value)

    with pytest.raises(CheckpointError, match=reason):
        build(write_gguf, "smollm", extra=extra)
