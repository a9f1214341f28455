"""Text that comes piece by piece is the whole text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizer.incremental import detokenizer
from jaxllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import BUILDERS, LINES

TOKENIZERS = {name: Tokenizer(build()) for name, build in BUILDERS.items()}
UNICODE = st.text() | st.text(alphabet="aé日😀\u200d \n<>|s/") | st.sampled_from(LINES)
pieces = st.lists(st.integers(1, 4), min_size=1)


def stream(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int], prompt: list[int], skip: bool
) -> str:
    detok = detokenizer(tokenizer, prompt, skip)
    out, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        out.append(detok.add(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return "".join(out) + detok.flush()


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@settings(max_examples=150, deadline=None)
@given(text=UNICODE, sizes=pieces, skip=st.booleans())
def test_pieces_make_the_whole(name: str, text: str, sizes: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert stream(tokenizer, ids, sizes, [], skip) == tokenizer.decode(ids, skip)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 420)), sizes=pieces, skip=st.booleans())
def test_any_tokens_even_broken_ones(ids: list[int], sizes: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert stream(tokenizer, ids, sizes, [], skip) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=pieces)
def test_continues_the_prompt(name: str, data: st.DataObject, sizes: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    words = st.lists(st.sampled_from(["the", "a", "playing", "plays", "b"]), min_size=1)
    prompt = tokenizer.encode(" ".join(data.draw(words)), False)
    ids = tokenizer.encode(" ".join(data.draw(words)), False)
    both = tokenizer.decode(prompt + ids, False)
    expected = both[len(tokenizer.decode(prompt, False)) :]
    assert stream(tokenizer, ids, sizes, prompt, False) == expected


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_never_half_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = "日本語 😀👩‍👩‍👧🇩🇪 é"
    detok = detokenizer(tokenizer)
    seen = ""
    for token_id in tokenizer.encode(text, False):
        seen += detok.add([token_id])
        assert "\ufffd" not in seen
    assert seen == text and detok.flush() == ""


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_flush_gives_up_on_half_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("a😀", False)[:-1]
    detok = detokenizer(tokenizer)
    assert detok.add(ids) == "a"
    assert set(detok.flush()) == {"\ufffd"}


def test_prompt_that_ends_inside_a_character() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    first, second = (tokenizer.backend.token_to_id(char) for char in "Ãī")  # C3 89 = É
    assert first is not None and second is not None
    detok = detokenizer(tokenizer, [first])
    assert detok.add([second]) == "É"


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("kind", ["special", "broken", "plain"])
def test_time_is_linear(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_id = {"special": 1, "broken": 200, "plain": tokenizer.encode("a", False)[-1]}[kind]
    begin = time.perf_counter()
    detok = detokenizer(tokenizer)
    for _ in range(20_000):
        detok.add((token_id,))
    assert time.perf_counter() - begin < 2.0
