"""DeepSeek V3 and R1-0528 with their fenced JSON, V3.1 with bare JSON. Either is read as either."""

import re

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_arguments
from jaxllm.parsers.reader import Markers, Mismatch, Reader, Steps

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"
_OPEN = Markers(CALLS, CALL)
_NAME = re.compile(r"[^<\s`{]+")


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            if (yield from r.accept(CALLS)):
                yield from r.spaces()
            yield from r.expect(CALL)
            yield from _call(r)
        yield from r.closing(FENCE)
        yield from r.closing(END_CALL)
        yield from r.closing(END_CALLS)


def _call(r: Reader) -> Steps[None]:
    name = yield from r.word(_NAME)
    yield from r.expect(SEPARATOR)
    if not (yield from r.sees("{")):  # then what came was the type, "function"
        name = yield from r.word(_NAME)
        yield from r.spaces()
        yield from r.accept(f"{FENCE}json")
        yield from r.spaces()
        if not (yield from r.sees("{")):
            raise Mismatch
    r.start_call(name)
    yield from json_arguments(r, r.arguments)
    r.end_call()


DEEPSEEK_V3 = ToolParser(
    _grammar,
    CallForm(
        opening=CALLS,
        begin=f"{CALL}function{SEPARATOR}",
        before_arguments=f"\n{FENCE}json\n",
        end=f"\n{FENCE}{END_CALL}",
        separator="\n",
        closing=END_CALLS,
        trigger=CALLS,
    ),
    special_tokens=True,
)
DEEPSEEK_V31 = ToolParser(
    _grammar,
    CallForm(
        opening=CALLS,
        begin=CALL,
        before_arguments=SEPARATOR,
        end=END_CALL,
        closing=END_CALLS,
        trigger=CALLS,
    ),
    special_tokens=True,
)
