"""Where thoughts begin and end, in every family: by the model, by the budget, before a grammar."""

import msgspec
import numpy as np
import pytest

from jaxllm.grammar.compiler import GrammarCompiler
from jaxllm.grammar.matcher import GrammarMatcher, fill_masks
from jaxllm.grammar.thoughts import ThoughtGate
from jaxllm.messages import Thoughts
from jaxllm.parsers.choice import REASONING_PARSERS, choose
from tests.fakes.ascii_tokenizer import EOS, ascii_tokenizer, ids_of, regex, text_of
from tests.parsers.transcripts import Said, parse

FAMILIES = REASONING_PARSERS.names()
ANYTHING = frozenset(range(96))
MOST = 130  # characters of an answer


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ascii_tokenizer)


def thoughts_of(family: str, prompt: str = "", budget: int | None = None) -> Thoughts:
    """As the frontend makes them, spelled character by character; line breaks are blanks here."""
    form = REASONING_PARSERS.load(family).form(prompt)
    assert form is not None
    after = form.after.replace("\n", " ")
    return Thoughts(
        form.opening,
        form.closings,
        tuple(ids_of(form.opening)),
        tuple(ids_of(form.closings[0] + after)),
        tuple(ids_of(after)),
        form.again,
        form.begun,
        budget,
    )


def gate_of(
    compiler: GrammarCompiler, thoughts: Thoughts, pattern: str | None = None
) -> ThoughtGate:
    grammar = None if pattern is None else (lambda: GrammarMatcher(compiler, regex(pattern)))
    return ThoughtGate(thoughts, compiler.bytes_of, grammar, (EOS,))


def allowed(gate: ThoughtGate) -> set[int]:
    mask = np.full((1, 3), -1, np.int32)
    if (grammar := gate.grammar) is not None:
        fill_masks([(0, grammar)], mask)
    gate.narrow(mask[0])
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def written(gate: ThoughtGate, text: str) -> str:
    """What comes of a model that wants to write ``text``, then nothing but "x"; where that may not
    come, the first that may.
    """
    wanted, out = ids_of(text), list[int]()
    while len(out) < MOST:
        may = allowed(gate)
        token = wanted.pop(0) if wanted and wanted[0] in may else None
        if token is None and not wanted:
            token = ids_of("x")[0] if ids_of("x")[0] in may else None
        token = min(may) if token is None else token
        out.append(token)
        gate.extend((token,))
        if token == EOS:
            break
    return text_of(out)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_used_budget_ends_the_thoughts(
    compiler: GrammarCompiler, family: str, budget: int
) -> None:
    thoughts = thoughts_of(family, "<think>" if family == "deepseek_r1" else "", budget)
    opening = "" if thoughts.begun else thoughts.opening
    text = written(gate_of(compiler, thoughts), opening + "y" * 30)
    closing = text_of(thoughts.closing_ids)
    assert text.startswith(opening + "y" * budget + closing + "y"), text
    parser = choose("none", family, None).answer("<think>" if thoughts.begun else "", {})
    assert parser is not None
    said = Said.of(parse(parser, [text]))
    assert said.reasoning == "y" * budget and said.content.startswith("y")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grammar_begins_behind_the_thoughts(compiler: GrammarCompiler, family: str) -> None:
    thoughts = thoughts_of(family)
    opening, closing = "" if thoughts.begun else thoughts.opening, thoughts.closings[0]
    after = text_of(thoughts.after_ids)
    for thought in ("", "42 is not it"):
        gate = gate_of(compiler, thoughts, "[0-9]{3}")
        text = written(gate, opening + thought + closing + after + "123")
        assert text == opening + thought + closing + after + "123", text
    gate = gate_of(compiler, thoughts, "[0-9]{3}")
    gate.extend(ids_of(opening + "y"))
    assert allowed(gate) == ANYTHING - {EOS}
    gate.extend(ids_of(closing))
    assert allowed(gate) == set(ids_of(after[0] if after else "0123456789"))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_r1"])
def test_thoughts_need_not_come(compiler: GrammarCompiler, family: str) -> None:
    thoughts = thoughts_of(family, budget=3)
    assert written(gate_of(compiler, thoughts, "[0-9]{3}"), "123") == "123"
    assert written(gate_of(compiler, thoughts), "y" * MOST) == "y" * MOST
    gate = gate_of(compiler, thoughts, "[0-9]{3}")
    assert allowed(gate) == set(ids_of("0123456789" + thoughts.opening[0]))
    assert allowed(gate_of(compiler, thoughts)) == ANYTHING


def test_thoughts_that_begin_with_a_word_are_not_offered(compiler: GrammarCompiler) -> None:
    thoughts = msgspec.structs.replace(thoughts_of("granite"), offered=False)
    gate = gate_of(compiler, thoughts, "[0-9]{3}")
    assert allowed(gate) == set(ids_of("0123456789"))
    text = thoughts.opening + "a!" + thoughts.closings[0] + " b!"
    assert written(gate_of(compiler, thoughts, "[^!]*!"), text) == text  # the grammar allows it


def test_what_begins_like_thoughts_may_be_the_answer(compiler: GrammarCompiler) -> None:
    gate = gate_of(compiler, thoughts_of("qwen3"), "<(table|thing)>")
    gate.extend(ids_of("<t"))
    assert allowed(gate) == set(ids_of("ah"))
    gate.extend(ids_of("h"))
    assert allowed(gate) == set(ids_of("i"))
    gate.extend(ids_of("in"))
    assert allowed(gate) == set(ids_of("gk"))
    gate.extend(ids_of("g"))
    assert allowed(gate) == set(ids_of(">"))
    for text in ("<thing>", "<think></think>  <table>"):
        assert written(gate_of(compiler, thoughts_of("qwen3"), "<(table|thing)>"), text) == text


def test_prose_does_not_take_thoughts_for_its_own(compiler: GrammarCompiler) -> None:
    text = "<think>a! b!</think>  c!"
    gate = gate_of(compiler, thoughts_of("qwen3"), "[^!]*!")
    assert written(gate, text) == text


def test_nothing_is_allowed_when_a_token_holds_the_end_and_more() -> None:
    """Of a grammar's answer nobody has seen the beginning then."""
    compiler = GrammarCompiler(ascii_tokenizer)
    thoughts = thoughts_of("qwen3", "<think>")
    gate = ThoughtGate(
        thoughts,
        lambda token: b">{" if token == 94 else compiler.bytes_of(token),
        lambda: GrammarMatcher(compiler, regex("[0-9]")),
        (EOS,),
    )
    gate.extend((*ids_of("</think"), 94))
    assert allowed(gate) == set()


def test_no_more_thoughts_once_the_budget_is_used(compiler: GrammarCompiler) -> None:
    thoughts = thoughts_of("openai_gptoss", budget=10)  # with the seven of "<|end|>"
    again = "<|end|><|start|>assistant" + thoughts.opening
    assert gate_of(compiler, thoughts).given == ()
    gate = gate_of(compiler, thoughts)
    gate.extend(ids_of(thoughts.opening + "yy" + again))
    assert not gate.given
    gate.extend(ids_of("y"))
    assert gate.given == thoughts.closing_ids
    gate.extend(thoughts.closing_ids)
    gate.extend(ids_of("Hi<"))
    assert ids_of("|")[0] not in allowed(gate)


def test_token_by_token_is_as_all_at_once(compiler: GrammarCompiler) -> None:
    """As after a preemption."""
    thoughts = thoughts_of("granite", budget=9)
    text = thoughts.opening + "123456789" + text_of(thoughts.closing_ids) + "12"
    stepwise = gate_of(compiler, thoughts, "[0-9]{3}")
    for n, token in enumerate(ids_of(text)):
        at_once = gate_of(compiler, thoughts, "[0-9]{3}")
        at_once.extend(ids_of(text)[:n])
        assert allowed(stepwise) == allowed(at_once)
        stepwise.extend((token,))
    assert allowed(stepwise) == set(ids_of("0123456789"))
