"""Masks: what may come next, when it may end, and what happens where a grammar gives up."""

import re
from collections import Counter

import numpy as np
import pytest

from jaxllm.grammar import compiler as module
from jaxllm.grammar.compiler import GrammarCompiler
from jaxllm.grammar.matcher import PARALLEL_FROM, GrammarMatcher, fill_masks
from tests.fakes.ascii_tokenizer import EOS, ascii_tokenizer, ids_of, regex, text_of

MANY_STATES = "(a|b)*a(a|b){8}"  # one for each of the last eight characters, in the end


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ascii_tokenizer)


def allowed(*matchers: GrammarMatcher) -> list[set[int]]:
    mask = np.full((len(matchers), 3), -1, np.int32)
    fill_masks(list(enumerate(matchers)), mask)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def after(compiler: GrammarCompiler, pattern: str, text: str) -> GrammarMatcher:
    matcher = GrammarMatcher(compiler, regex(pattern))
    matcher.extend(ids_of(text))
    return matcher


@pytest.mark.parametrize(
    ("pattern", "text", "following"),
    [
        ("ab+", "", "a"),
        ("ab+", "a", "b"),
        ("ab+", "abb", "b$"),
        ("ab{2}", "abb", "$"),
        ("(yes|no)!?", "no", "!$"),
        ("[a-c]x|[b-d]y", "", "abcd"),
        ("[a-c]x|[b-d]y", "b", "xy"),
    ],
)
def test_what_may_follow(
    compiler: GrammarCompiler, pattern: str, text: str, following: str
) -> None:
    want = {EOS if char == "$" else ord(char) - 32 for char in following}
    assert allowed(after(compiler, pattern, text)) == [want]


@pytest.mark.parametrize("count", [1, PARALLEL_FROM - 1, PARALLEL_FROM, 20])
def test_rows_together_are_as_alone(compiler: GrammarCompiler, count: int) -> None:
    texts = [("ab" * count)[:i] for i in range(count)]
    together = allowed(*(after(compiler, "(ab)*", text) for text in texts))
    assert together == [allowed(after(compiler, "(ab)*", text))[0] for text in texts]
    assert together[0] == {EOS, *ids_of("a")}


def test_rows_without_a_grammar_keep_their_words(compiler: GrammarCompiler) -> None:
    mask = np.arange(9, dtype=np.int32).reshape(3, 3)
    fill_masks([(1, after(compiler, "a", ""))], mask)
    assert mask[[0, 2]].tolist() == [[0, 1, 2], [6, 7, 8]]


def test_token_by_token_is_as_all_at_once(compiler: GrammarCompiler) -> None:
    """As after a preemption."""
    stepwise = after(compiler, "[a-c]{3}(x|yz)*", "")
    for n, char in enumerate("abcyzx"):
        assert allowed(stepwise) == allowed(after(compiler, "[a-c]{3}(x|yz)*", "abcyzx"[:n]))
        stepwise.extend(ids_of(char))


def test_after_the_end_nothing_but_the_end(compiler: GrammarCompiler) -> None:
    """The step dispatched ahead of the result asks so; its token is dropped."""
    ended = after(compiler, "a*", "aa")
    assert EOS in allowed(ended)[0]
    ended.extend((EOS,))
    assert allowed(ended) == [{EOS}]


@pytest.mark.parametrize("text", ["c", "ac", "abx"])
def test_a_token_against_the_grammar_leaves_nothing(compiler: GrammarCompiler, text: str) -> None:
    assert allowed(after(compiler, "ab+", text), after(compiler, "ab+", "a")) == [
        set(),
        set(ids_of("b")),
    ]


def test_a_grammar_that_gives_up_allows_nothing(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than the end, with which half an answer would pass for a whole one."""
    monkeypatch.setattr(module, "LIMITS", module.LLParserLimits(max_lexer_states=20))
    matcher, rng = after(compiler, MANY_STATES, ""), np.random.default_rng(0)
    found: list[set[int]] = []
    for char in rng.choice(("a", "b"), 100):
        found += allowed(matcher)
        matcher.extend(ids_of(char))
    assert set() in found and {EOS} not in found


def test_a_grammar_that_does_not_compile_allows_nothing(compiler: GrammarCompiler) -> None:
    assert allowed(GrammarMatcher(compiler, regex("("))) == [set()]


def test_without_a_tokenizer_nothing_is_allowed() -> None:
    def fail() -> None:
        raise RuntimeError("no tokenizer")

    compiler = GrammarCompiler(fail)  # pyright: ignore[reportArgumentType]
    assert allowed(after(compiler, "a", "")) == [set()]


def test_states_of_others_do_not_end_an_answer(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern whose states depend on the text: many texts fill the lexer they share."""
    monkeypatch.setattr(module, "LIMITS", module.LLParserLimits(max_lexer_states=120))
    pattern, rng = MANY_STATES, np.random.default_rng(0)
    for _ in range(40):
        text = "".join(rng.choice(("a", "b"), 12))
        want = {*ids_of("ab")} | ({EOS} if re.fullmatch(pattern, text) else set())
        for n in range(12):
            assert allowed(after(compiler, pattern, text[:n]))[0] >= set(ids_of("ab"))
        assert allowed(after(compiler, pattern, text)) == [want]


def lanes_of(matchers: list[GrammarMatcher]) -> list[int]:
    """How many matchers each lane has."""
    allowed(*matchers)
    return sorted(Counter(matcher.lane for matcher in matchers).values())


def test_matchers_that_would_wait_for_each_other_are_few(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one lane compute one after the other, so many rows have several, but not too many;
    and a lane serves again whose rows have gone.
    """
    monkeypatch.setattr(module, "LANES_S", 60.0)
    monkeypatch.setattr(module, "MAX_LANES", 3)
    few = module.MATCHERS_PER_LANE
    matchers = [after(compiler, "(ab)*", "ab" * n) for n in range(3 * few + 2)]
    assert lanes_of(matchers[:few]) == [few]
    assert lanes_of(matchers[: few + 1]) == [1, few]
    assert lanes_of(matchers) == [few, few + 1, few + 1]
    known = {matcher.lane for matcher in matchers}
    del matchers
    again = [after(compiler, "(ab)*", "") for _ in range(2)]
    assert lanes_of(again) == [1, 1]
    assert {matcher.lane for matcher in again} <= known


def test_what_takes_long_to_compile_is_compiled_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LANES_S", 0.0)
    assert lanes_of([after(compiler, "(ab)*", "") for _ in range(9)]) == [9]


def test_the_cache_is_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 1000)
    for number in range(100):
        assert allowed(after(compiler, f"{number}", ""))[0] == set(ids_of(f"{number}"[0]))
        assert compiler._bytes == sum(map(len, compiler._grammars)) <= 1000
    assert 1 < len(compiler._grammars) <= module.MAX_CACHED
    assert allowed(after(compiler, "x" * 2000, ""))[0] == set(ids_of("x"))
    assert len(compiler._grammars) == 1


def test_text_of() -> None:
    assert text_of([*ids_of("a b"), EOS]) == text_of(ids_of("a b")) == "a b"
