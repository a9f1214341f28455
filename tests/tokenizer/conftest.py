"""Three small tokenizers, one for each way in which vocabularies spell bytes."""

import json
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as HFTokenizer

from jaxllm.tokenizer.tokenizer import Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog. ",
    "Привет, как дела? 日本語のテキスト 中文 한국어 😀😃👩‍👩‍👧 🇩🇪",
    "naïve café — “quotes” … \n\n  def f(x):\n    return x  ",
] * 4


def byte_level() -> HFTokenizer:
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def sentencepiece() -> HFTokenizer:
    """As Llama 2: spaces are U+2581, unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,"))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    vocab = {p: i for i, p in enumerate([*pieces, *letters, *("".join(m) for m in merges)])}
    tokenizer = HFTokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def wordpiece() -> HFTokenizer:
    words = ["[UNK]", "[SEP]", "play", "##ing", "##s", "the", "a", "##b", ".", "b"]
    tokenizer = HFTokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return tokenizer


BUILDERS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}


@pytest.fixture(scope="session", params=BUILDERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(BUILDERS[request.param]())


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


@pytest.fixture(scope="session")
def spaces_tokenizer() -> Tokenizer:
    return Tokenizer(sentencepiece())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "<|end|>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
