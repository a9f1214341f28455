"""Thoughts between two markers, at the beginning of an answer and nowhere else. What follows them
may stand between two more.
"""

from collections.abc import Callable
from dataclasses import replace

from jaxllm.parsers.family import ReasoningParser, ThoughtForm
from jaxllm.parsers.machine import Grammar
from jaxllm.parsers.reader import Markers, Mismatch, Reader, Steps

TAGS = ("<think>",), ("</think>",)
BRACKETS = ("[THINK]",), ("[/THINK]",)
SENTENCES = (
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
)
STEPS = ("Here are my reasoning steps:",), ("[BEGIN FINAL RESPONSE]",)
SEED = ("<seed:think>",), ("</seed:think>",)


def _between(
    openings: tuple[str, ...], closings: tuple[str, ...], around: tuple[str, str] | None = None
) -> Grammar:
    """``around``: what thoughts are followed by stands between these two, the first of which may be
    empty.
    """
    markers = Markers(*closings)

    def grammar(r: Reader) -> Steps[None]:
        begun = False
        with r.attempt():
            yield from r.spaces()
            for opening in openings:
                begun = begun or (yield from r.accept(opening))
            begun = begun or r.in_reasoning
            if not begun:
                raise Mismatch
        if begun:
            if closing := (yield from r.until(markers, r.reasoning)):
                yield from r.expect(closing)
            yield from r.spaces()
            if around is not None:
                yield from _unwrapped(r, *around)

    return grammar


def _unwrapped(r: Reader, opening: str, closing: str) -> Steps[None]:
    if not (yield from r.accept(opening)):
        return
    r.rests()
    yield from r.spaces()
    if (yield from r.content_until(Markers(closing))):
        yield from r.expect(closing)
        r.content_ends()


def _ends_with(*literals: str) -> Callable[[str], bool]:
    return lambda prompt: prompt.rstrip().endswith(literals)


def _not_closed(prompt: str) -> bool:
    return not prompt.rstrip().endswith(TAGS[1])


def _marks(markers: tuple[tuple[str, ...], tuple[str, ...]], after: str) -> ThoughtForm:
    openings, closings = markers
    return ThoughtForm(openings[0], closings, after)


# R1's answers begin with thoughts whether or not prompt or model have written the tag.
DEEPSEEK_R1 = ReasoningParser(_between(*TAGS), _not_closed, marks=_marks(TAGS, "\n\n"))
THINK = ReasoningParser(_between(*TAGS), _ends_with(*TAGS[0]), marks=_marks(TAGS, "\n\n"))
DEEPSEEK_V3 = replace(THINK, marks=_marks(TAGS, ""))
GLM45 = replace(THINK, marks=_marks(TAGS, "\n"))
MISTRAL = ReasoningParser(
    _between(*BRACKETS),
    _ends_with(*BRACKETS[0]),
    special_tokens=True,
    marks=_marks(BRACKETS, ""),
)
GRANITE = ReasoningParser(
    _between(*SENTENCES), _ends_with(*SENTENCES[0]), marks=_marks(SENTENCES, " ")
)
GRANITE33 = replace(
    THINK,
    grammar=_between(*TAGS, ("<response>", "</response>")),
    marks=replace(_marks(TAGS, "\n"), answer="<response>"),
)
APRIEL = ReasoningParser(
    _between(*STEPS, ("", "[END FINAL RESPONSE]")),
    _ends_with(*STEPS[0]),
    special_tokens=True,  # since 1.6
    marks=_marks(STEPS, "\n"),
)
# Where its template was given a budget of 0, it goes on to say so.
SEED_OSS = ReasoningParser(
    _between(*SEED),
    _ends_with(*SEED[0], "<seed:cot_budget_reflect>"),
    special_tokens=True,
    marks=_marks(SEED, "\n"),
)
