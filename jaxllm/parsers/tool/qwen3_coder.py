"""Qwen3-Coder and Seed-OSS: a tag per argument, values bare, their types in the tool's schema.

Models forget the tag before ``<function=``, so that alone begins a call too.
"""

import json
import re

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.machine import Grammar
from jaxllm.parsers.reader import Markers, Reader, Steps
from jaxllm.parsers.typed_value import argument_types, typed_value

FUNCTION = "<function="
PARAMETER, END_PARAMETER, END_FUNCTION = "<parameter=", "</parameter>", "</function>"
_NAME = re.compile(r"[^<>\s]+")


def _parser(opening: str, closing: str, line: str, *, special_tokens: bool) -> ToolParser:
    """``line``: what stands before a value and behind it, and is no part of it."""
    form = CallForm(
        begin=f"{opening}\n{FUNCTION}",
        before_arguments=">\n",
        end=f"{END_FUNCTION}\n{closing}",
        separator="\n",
        arguments="tagged",
        trigger=opening,
        tag=f"{PARAMETER}{{name}}>{line}{{value}}{line}{END_PARAMETER}\n",
    )
    return ToolParser(_grammar(opening, closing, line), form, special_tokens)


def _grammar(opening: str, closing: str, line: str) -> Grammar:
    first = Markers(opening, FUNCTION)
    end_of_value = Markers(*dict.fromkeys((f"{line}{END_PARAMETER}", END_PARAMETER)))

    def grammar(r: Reader) -> Steps[None]:
        while (yield from r.content_until(first)):
            with r.attempt():
                if (yield from r.accept(opening)):
                    yield from r.spaces()
                yield from r.expect(FUNCTION)
                name = yield from r.word(_NAME)
                yield from r.expect(">")
                r.start_call(name)
                yield from arguments(r, name)
                r.end_call()
            yield from r.closing(closing)

    def arguments(r: Reader, name: str) -> Steps[None]:
        before = "{"
        yield from r.spaces()
        while not (yield from r.accept(END_FUNCTION)) and not (yield from r.sees(closing)):
            yield from r.expect(PARAMETER)
            parameter = yield from r.word(_NAME)
            yield from r.expect(">")
            yield from r.accept(line)
            r.arguments(f"{before}{json.dumps(parameter, ensure_ascii=False)}: ")
            types = argument_types(r.tools.get(name), parameter)
            yield from typed_value(r, types, end_of_value, r.arguments)
            yield from r.spaces()
            before = ", "
        r.arguments("{}" if before == "{" else "}")

    return grammar


QWEN3_CODER = _parser("<tool_call>", "</tool_call>", "\n", special_tokens=False)
SEED_OSS = _parser("<seed:tool_call>", "</seed:tool_call>", "", special_tokens=True)
