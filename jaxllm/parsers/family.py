"""What a family of models is to the rest: how its text is read, and how a call would be written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from secrets import choice, token_hex
from string import ascii_letters, digits
from typing import Any, Literal

from jaxllm.parsers.machine import Grammar


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls stand in the text, as data: enough to force them with a grammar.

    The text is ``opening``, calls with ``separator`` between them, ``closing``. A call is
    ``begin``, its name, ``before_arguments``, its arguments, ``end``. ``arguments`` says how those
    are written. "json": an object. "python": ``a=1, b="x"``. "tagged": for each, ``tag`` with
    ``{name}`` and ``{value}``, strings bare and other values as JSON. Special tokens are spelled
    out. ``trigger``: what the first call begins with and other text never holds; "" if there is
    nothing like it. ``one``: an answer holds no more than one call.
    """

    begin: str
    before_arguments: str
    end: str
    opening: str = ""
    separator: str = ""
    closing: str = ""
    arguments: Literal["json", "python", "tagged"] = "json"
    tag: str = ""
    trigger: str = ""
    one: bool = False


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """How thoughts stand before the rest of an answer: ``opening``, thoughts, one of ``closings``.

    Where the model does not end them itself the first of these is written for it. ``after`` is
    what it then writes before the rest, and ``answer`` before a rest that calls no tool.
    ``again``: thoughts may come more than once. ``begun``: by the prompt.
    """

    opening: str
    closings: tuple[str, ...]
    after: str = ""
    answer: str = ""
    again: bool = False
    begun: bool = False


@dataclass(frozen=True, slots=True)
class ForcedCalls:
    """Which calls an answer must hold: one at least, each of one of ``tools``; if not ``required``,
    which calls it may hold. Nothing stands before required ones but thoughts.
    """

    form: CallForm
    tools: Mapping[str, Any]  # name -> JSON schema of its arguments
    parallel: bool  # more than one may follow
    special_tokens: bool = False  # in the form, as such
    required: bool = True

    def text(self) -> str:
        """As jaxllm.grammar takes it. Raises TypeError or ValueError: a schema is not JSON."""
        return json.dumps(asdict(self) | {"tools": list(self.tools.items())}, ensure_ascii=False)


def new_call_id() -> str:
    return f"call_{token_hex(12)}"


def nine_characters() -> str:
    """Mistral's templates take no other ids."""
    return "".join(choice(ascii_letters + digits) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolParser:
    """``special_tokens``: the markers are special tokens, so the text must keep those.
    ``reads_reasoning``: the same grammar reads the model's thoughts, and none stands before it.
    """

    grammar: Grammar
    form: CallForm
    special_tokens: bool = False
    reads_reasoning: bool = False
    new_id: Callable[[], str] = new_call_id

    def forced(self, tools: Mapping[str, Any], named: str | None, parallel: bool) -> ForcedCalls:
        """For ``tool_choice``: "required", or the tool ``named``. Raises KeyError: no such tool."""
        chosen = tools if named is None else {named: tools[named]}
        more = parallel and named is None and not self.form.one
        return ForcedCalls(self.form, chosen, more, self.special_tokens)


@dataclass(frozen=True, slots=True)
class ReasoningParser:
    """``begun_by``: whether a prompt has begun the thoughts, which the answer then goes on with.
    ``marks``: how thoughts are written, where the engine must know. The other fields are as in
    ``ToolParser``.
    """

    grammar: Grammar
    begun_by: Callable[[str], bool]
    special_tokens: bool = False
    reads_calls: bool = False
    marks: ThoughtForm | None = None

    def form(self, prompt: str, *, calls: bool = False) -> ThoughtForm | None:
        """Of an answer to ``prompt`` that may call tools, or may not; None if nothing is known of
        it, or the prompt has ended the thoughts already.
        """
        marks = self.marks
        if marks is None or prompt.rstrip().endswith(marks.closings):
            return None
        after = marks.after if calls else marks.after + marks.answer
        return replace(marks, after=after, answer="", begun=self.begun_by(prompt))
