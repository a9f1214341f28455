"""Thoughts between two markers, at the beginning of an answer and nowhere else."""

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


def _between(openings: tuple[str, ...], closings: tuple[str, ...]) -> Grammar:
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

    return grammar


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
