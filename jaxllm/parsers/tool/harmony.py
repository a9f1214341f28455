"""gpt-oss: OpenAI's harmony, a message per channel. Reads thoughts, calls and content alike.

The prompt ends with ``<|start|>assistant``, so an answer begins with the rest of that header:
``<|channel|>analysis<|message|>...<|end|>``, or ``commentary to=functions.NAME`` for a call.
"""

import re

from jaxllm.parsers.family import CallForm, ReasoningParser, ThoughtForm, ToolParser
from jaxllm.parsers.reader import Emit, Markers, Mismatch, Reader, Steps

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
RECIPIENT, FUNCTIONS = " to=", "functions."
_BEGINS = Markers(START, CHANNEL)
_BODY = Markers(MESSAGE, END, CALL, RETURN)
_ENDS = Markers(END, CALL, RETURN, START, CHANNEL)
_WORD = re.compile(r"[^<>\s|]+")
_MAX_HEADER = 256


def _grammar(r: Reader) -> Steps[None]:
    begins = (yield from r.sees(RECIPIENT)) or (yield from r.content_until(_BEGINS))
    while begins:
        yield from _message(r)
        begins = yield from r.content_until(_BEGINS)


def _message(r: Reader) -> Steps[None]:
    channel = recipient = ""
    with r.attempt():
        channel, recipient = yield from _header(r)
    if not channel:
        return
    if recipient.startswith(FUNCTIONS) and r.tools:
        r.start_call(recipient.removeprefix(FUNCTIONS))
        yield from _body(r, r.arguments)
        r.end_call()
        return
    spoken = channel in ("final", "commentary") and (not recipient or FUNCTIONS in recipient)
    yield from _body(r, r.content if spoken else r.reasoning)


def _header(r: Reader) -> Steps[tuple[str, str]]:
    """The message's channel, and to whom it goes if not to the user."""
    header = yield from r.text_until(_BODY, _MAX_HEADER)
    yield from r.expect(MESSAGE)
    before, _, after = header.partition(CHANNEL)
    if not (channel := _first_word(after)):
        raise Mismatch
    return channel, _first_word(f"{before} {after}".partition(RECIPIENT)[2])


def _first_word(text: str) -> str:
    found = _WORD.search(text)
    return found[0] if found else ""


def _body(r: Reader, emit: Emit) -> Steps[None]:
    marker = yield from r.until(_ENDS, emit)
    if marker in (END, CALL, RETURN):
        yield from r.expect(marker)


_OPENAI = CallForm(
    begin=f"{CHANNEL}commentary to={FUNCTIONS}",
    before_arguments=f" <|constrain|>json{MESSAGE}",
    end=CALL,
    separator=f"{START}assistant",
)
OPENAI = ToolParser(_grammar, _OPENAI, special_tokens=True, reads_reasoning=True)
OPENAI_GPTOSS = ReasoningParser(
    _grammar,
    lambda _: False,
    special_tokens=True,
    reads_calls=True,
    marks=ThoughtForm(
        f"{CHANNEL}analysis{MESSAGE}",
        (END,),
        after=f"{START}assistant",
        answer=f"{CHANNEL}final{MESSAGE}",
        again=True,
    ),
)
