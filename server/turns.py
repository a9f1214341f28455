"""What the choices of one request say: their text read for thoughts and calls, as it comes.

Knows no API's objects; routes turn its events into theirs.
"""

from dataclasses import replace

from jaxllm.errors import InvalidRequestError
from jaxllm.outputs import CompletionOutput
from jaxllm.parsers.choice import Parsers
from jaxllm.parsers.events import Content, Event, Reasoning, ToolCallStart, merged
from jaxllm.parsers.family import new_call_id
from jaxllm.parsers.machine import AnswerParser
from jaxllm.sampling_params import SamplingParams
from server.tool_choice import ToolChoice


class Turns:
    """``parallel``: false leaves out all calls but the first. ``thoughts``: false, the thoughts."""

    def __init__(
        self,
        parsers: Parsers,
        prompt: str,
        choice: ToolChoice,
        *,
        parallel: bool = True,
        thoughts: bool = True,
    ):
        parsers = parsers.calling() if choice.required else parsers
        self._parsers, self._prompt, self._choice = parsers, prompt, choice
        self._parallel, self._thoughts = parallel, thoughts
        self._new_id = parsers.tool.new_id if parsers.tool is not None else new_call_id
        self._readers: dict[int, AnswerParser | None] = {}
        self._called: set[int] = set()
        self.skips_special_tokens = True  # what is read, as ``params`` has it

    def params(self, params: SamplingParams) -> SamplingParams:
        """With the grammar of calls that are forced, and with special tokens in the text where
        markers are such tokens.

        Raises:
            InvalidRequestError: calls cannot be forced, or not together with what else was asked.
        """
        if self._parsers.wants_special_tokens(bool(self._choice.tools)):
            params = replace(params, skip_special_tokens=False)
        self.skips_special_tokens = params.skip_special_tokens
        return self._with_thoughts(
            self._choice.params(params, self._parsers, parallel=self._parallel)
        )

    def _with_thoughts(self, params: SamplingParams) -> SamplingParams:
        """A budget for them, or a grammar behind them, needs to know how they are marked."""
        reasoning, grammar = self._parsers.reasoning, params.structured_outputs
        if reasoning is None or reasoning.marks is None:
            if params.thinking_token_budget is None:
                return params
            raise InvalidRequestError(
                "This server does not know how the model marks its thoughts, so it cannot end "
                "them: start it with --reasoning-parser.",
                param="thinking_token_budget",
                code="no_thoughts",
            )
        calls = bool(self._choice.tools) and (grammar is None or grammar.calls is not None)
        form = reasoning.form(self._prompt, calls=calls)
        if form is None:  # the prompt has ended them
            return replace(params, thinking_token_budget=None)
        return replace(params, thoughts=form)

    def read(self, index: int, completion: CompletionOutput) -> list[Event]:
        """What is new in a choice; ``completion`` brings only that, or is the only one."""
        reader = self._reader(index)
        if reader is None:
            return [Content(completion.text)] if completion.text else []
        events = reader.feed(completion.text)
        if completion.finished:
            events += reader.finish()
        return [self._named(index, event) for event in merged(events) if self._wanted(event)]

    def may_think(self, index: int) -> bool:
        """Whether what comes next of a choice may be thoughts."""
        reader = self._reader(index)
        return reader is not None and reader.may_think

    def thoughts(self, index: int) -> list[tuple[int, int]]:
        """Where thoughts stand in a choice's text so far: [start, end) in characters."""
        reader = self._reader(index)
        return [] if reader is None else reader.thoughts

    def called(self, index: int) -> bool:
        """Whether the choice has called a tool."""
        return index in self._called

    @property
    def named(self) -> bool:
        """Whether the request itself has said which tool is called."""
        return self._choice.named is not None

    def _reader(self, index: int) -> AnswerParser | None:
        if index not in self._readers:
            self._readers[index] = self._parsers.answer(self._prompt, self._choice.tools)
        return self._readers[index]

    def _wanted(self, event: Event) -> bool:
        if isinstance(event, Reasoning):
            return self._thoughts
        return self._parallel or isinstance(event, Content) or event.index == 0

    def _named(self, index: int, event: Event) -> Event:
        if not isinstance(event, ToolCallStart):
            return event
        self._called.add(index)
        return event if event.id is not None else replace(event, id=self._new_id())
