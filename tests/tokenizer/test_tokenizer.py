"""Tokenizer directories, and agreement with transformers."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.tokenizer.tokenizer import Tokenizer

TEXT = "The quick 日本語 😀 <think>café</think> <|end|> the end."


def test_reads_a_directory(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    assert tokenizer.special_ids == {0, 1}
    ids = tokenizer.encode("The quick brown fox jumps")
    assert ids[0] == 1 and len(ids) > 4 and ids.count(0) == 0  # neither truncated nor padded
    assert tokenizer.encode("The", add_special_tokens=False) == tokenizer.encode("The")[1:]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<s>x<|end|>"


def test_agrees_with_transformers(model_dir: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(model_dir / "tokenizer.json"))
    ours = Tokenizer.from_dir(model_dir)
    for text in (TEXT, "", " ", "<s><s>x", "\n\n"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_in_the_text_are_special(bytes_tokenizer: Tokenizer) -> None:
    assert bytes_tokenizer.encode("<|end|>", False) == [0]
    assert bytes_tokenizer.decode([0]) == ""
    assert bytes_tokenizer.decode([0], skip_special_tokens=False) == "<|end|>"


def test_bytes_of_tokens_make_up_the_text(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode(TEXT, False)
    assert b"".join(bytes_tokenizer.token_to_bytes(i) for i in ids) == TEXT.encode()
    assert bytes_tokenizer.token_to_bytes(99_999) == b""
    (space,) = bytes_tokenizer.encode(" ", False)
    assert bytes_tokenizer.token_string(space) == " "


def test_bytes_of_sentencepiece_tokens(spaces_tokenizer: Tokenizer) -> None:
    ids = spaces_tokenizer.encode("the café 😀.", False)
    joined = b"".join(spaces_tokenizer.token_to_bytes(i) for i in ids)
    assert joined == " the café 😀.".encode()
    assert spaces_tokenizer.token_string(ids[0]) == " the"


def test_half_a_surrogate_pair_is_refused(bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="character 2"):
        bytes_tokenizer.encode("ab\ud83d")


def test_other_threads_run_while_a_long_text_is_encoded(bytes_tokenizer: Tokenizer) -> None:
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        while not ticks:
            time.sleep(0.001)
        before = ticks
        bytes_tokenizer.encode("the quick brown fox " * 20_000)
        meanwhile = ticks - before
    finally:
        done.set()
        thread.join()
    assert meanwhile > 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing", "", "No tokenizer"),
        ("tokenizer.json", '{"model": 1}', "not a readable tokenizer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "JSON object"),
    ],
)
def test_broken_directories(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        Tokenizer.from_dir(tmp_path)


def test_several_templates_by_name(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    config = json.dumps({"chat_template": templates})
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = Tokenizer.from_dir(tmp_path)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(message) == "plain"
    assert tokenizer.apply_chat_template(message, tools=[{}]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(message) == "file"


def test_no_template(bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        bytes_tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.code == "no_chat_template"


def test_needs_no_transformers_and_no_jax(model_dir: Path) -> None:
    code = (
        "import sys; from jaxllm.tokenizer.tokenizer import Tokenizer\n"
        "t = Tokenizer.from_dir(sys.argv[1]); t.encode('x')\n"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}])\n"
        "sys.exit(bool({'transformers', 'jax', 'torch'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, model_dir], cwd=root).returncode == 0
