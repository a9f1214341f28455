"""Qwen3-Coder: a tag per argument, values bare, their types in the tool's schema.

Models forget ``<tool_call>`` before ``<function=``, so that alone begins a call too.
"""

import json
import re

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.reader import Markers, Reader, Steps
from jaxllm.parsers.typed_value import argument_types, typed_value

OPEN, CLOSE, FUNCTION = "<tool_call>", "</tool_call>", "<function="
PARAMETER, END_PARAMETER, END_FUNCTION = "<parameter=", "</parameter>", "</function>"
_OPEN = Markers(OPEN, FUNCTION)
_END = Markers(f"\n{END_PARAMETER}", END_PARAMETER)  # the line's end is not the value's
_NAME = re.compile(r"[^<>\s]+")


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            if (yield from r.accept(OPEN)):
                yield from r.spaces()
            yield from r.expect(FUNCTION)
            name = yield from r.word(_NAME)
            yield from r.expect(">")
            r.start_call(name)
            yield from _arguments(r, name)
            r.end_call()
        yield from r.closing(CLOSE)


def _arguments(r: Reader, name: str) -> Steps[None]:
    before = "{"
    yield from r.spaces()
    while not (yield from r.accept(END_FUNCTION)) and not (yield from r.sees(CLOSE)):
        yield from r.expect(PARAMETER)
        parameter = yield from r.word(_NAME)
        yield from r.expect(">")
        yield from r.accept("\n")
        r.arguments(f"{before}{json.dumps(parameter, ensure_ascii=False)}: ")
        types = argument_types(r.tools.get(name), parameter)
        yield from typed_value(r, types, _END, r.arguments)
        yield from r.spaces()
        before = ", "
    r.arguments("{}" if before == "{" else "}")


QWEN3_CODER = ToolParser(
    _grammar,
    CallForm(
        begin="<tool_call>\n<function=",
        before_arguments=">\n",
        end="</function>\n</tool_call>",
        separator="\n",
        arguments="tagged",
        trigger=OPEN,
        tag="<parameter={name}>\n{value}\n</parameter>\n",
    ),
)
