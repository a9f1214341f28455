"""Which tools an answer may call, and which it must: the ``tool_choice`` of all chat APIs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxllm.errors import InvalidRequestError
from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.parsers.choice import Parsers
from jaxllm.parsers.family import ForcedCalls
from jaxllm.sampling_params import SamplingParams

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # what every family's form can write
_FORMATS = (
    "response_format",
    "text.format",
    "output_config.format",
)  # of what an answer says when it calls nothing


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """``tools``: names that may be called, each with the JSON schema of its arguments. ``strict``:
    those whose schema a call must follow even if it need not come. ``named``: the one to call.
    ``limited``: others, which the model may have been told of, must not be called.
    """

    tools: Mapping[str, Any] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()
    required: bool = False
    named: str | None = None
    limited: bool = False

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]] | None, choice: Any) -> "ToolChoice":
        """Both in the form of chat completions, ``choice`` checked.

        Raises:
            InvalidRequestError: a call is required, and there is no such tool.
        """
        if choice == "none":
            return cls()
        functions = [tool.get("function") for tool in tools or ()]
        known = [f for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)]
        schemas = {function["name"]: function.get("parameters") for function in known}
        strict = frozenset(f["name"] for f in known if f.get("strict") is True)
        if choice in (None, "auto"):
            return cls(schemas, strict)
        if choice != "required" and choice["type"] == "allowed_tools":
            return cls._allowed(schemas, strict, choice["allowed_tools"])
        if not schemas:
            raise _invalid("tool_choice", "a call is required, but there are no tools")
        named = None if choice == "required" else choice["function"]["name"]
        if named is not None and named not in schemas:
            raise _invalid("tool_choice", f"there is no tool {named[:64]!r} among tools")
        return cls(schemas, strict, required=True, named=named)

    @classmethod
    def _allowed(
        cls, schemas: Mapping[str, Any], strict: frozenset[str], allowed: Mapping[str, Any]
    ) -> "ToolChoice":
        names = [tool["function"]["name"] for tool in allowed["tools"]]
        if unknown := [name for name in names if name not in schemas]:
            raise _invalid("tool_choice", f"there is no tool {unknown[0][:64]!r} among tools")
        if not names:
            raise _invalid("tool_choice", "no tool is allowed: say 'none'")
        chosen = {name: schemas[name] for name in names}
        return cls(chosen, strict, required=allowed["mode"] == "required", limited=True)

    def params(self, params: SamplingParams, parsers: Parsers, *, parallel: bool) -> SamplingParams:
        """With a grammar, where the answer must call or what it calls must follow a schema.

        Raises:
            InvalidRequestError: another grammar was asked for, or names cannot be written.
        """
        forced = self._forced(parsers, parallel)
        asked = params.structured_outputs
        if forced is None or (asked is not None and not self.required):
            return params
        if asked is not None and asked.param not in _FORMATS:
            raise asked.invalid("it cannot go with a tool_choice that requires a call")
        for name in forced.tools:
            if not _NAME.fullmatch(name):
                raise _invalid(
                    "tools", f"{name[:64]!r} is not a name of letters, digits, _, . or -"
                )
        grammar = StructuredOutputsParams(calls=forced.text(), param="tools")
        return replace(params, structured_outputs=grammar)

    def _forced(self, parsers: Parsers, parallel: bool) -> ForcedCalls | None:
        if parsers.tool is None:
            return None
        if self.required:
            return parsers.tool.forced(self.tools, self.named, parallel)
        if not (self.strict or self.limited) or not parsers.tool.form.trigger:
            return None
        tools = {
            name: schema if name in self.strict else {"type": "object"}
            for name, schema in self.tools.items()
        }
        return replace(parsers.tool.forced(tools, None, parallel), required=False)


def _invalid(param: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{param}': {reason}.", param=param, code="invalid_value")
