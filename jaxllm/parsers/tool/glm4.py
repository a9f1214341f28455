"""GLM-4.5 and later: keys and values in tags. GLM-4: the bare name, a line's end, JSON."""

import json
import re

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_arguments
from jaxllm.parsers.reader import Markers, Mismatch, Reader, Steps
from jaxllm.parsers.typed_value import argument_types, typed_value

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, END_KEY, VALUE, END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_OPEN, _END_KEY, _END_VALUE = Markers(OPEN), Markers(END_KEY), Markers(END_VALUE)
_NAME = re.compile(r"[^<>\s{}]+")
_MAX_KEY = 256


def _tagged(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            yield from r.expect(OPEN)
            yield from r.spaces()
            name = yield from r.word(_NAME)
            yield from r.spaces()
            if not (yield from r.sees(KEY)) and not (yield from r.sees(CLOSE)):
                raise Mismatch
            r.start_call(name)
            yield from _arguments(r, name)
            r.end_call()
        yield from r.closing(CLOSE)


def _arguments(r: Reader, name: str) -> Steps[None]:
    before = "{"
    while (yield from r.accept(KEY)):
        key = (yield from r.text_until(_END_KEY, _MAX_KEY)).strip()
        yield from r.expect(END_KEY)
        yield from r.spaces()
        yield from r.expect(VALUE)
        r.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        types = argument_types(r.tools.get(name), key)
        yield from typed_value(r, types, _END_VALUE, r.arguments)
        yield from r.spaces()
        before = ", "
    if not (yield from r.sees(CLOSE)):
        raise Mismatch
    r.arguments("{}" if before == "{" else "}")


def _bare(r: Reader) -> Steps[None]:
    with r.attempt():
        yield from r.spaces()
        name = yield from r.word(_NAME)
        if name not in r.tools or not (yield from r.accept("\n")):
            raise Mismatch
        yield from r.spaces()
        if not (yield from r.sees("{")):
            raise Mismatch
        r.start_call(name)
        yield from json_arguments(r, r.arguments)
        r.end_call()


GLM45 = ToolParser(
    _tagged,
    CallForm(
        begin="<tool_call>",
        before_arguments="\n",
        end="</tool_call>",
        separator="\n",
        arguments="tagged",
        trigger=OPEN,
        tag="<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
)
GLM4 = ToolParser(_bare, CallForm(begin="", before_arguments="\n", end="", one=True))
