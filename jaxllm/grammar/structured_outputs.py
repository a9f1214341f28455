"""What the text of an answer must look like. Names are vLLM's; knows no grammar library."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jaxllm.errors import InvalidRequestError

MAX_BYTES = 512 * 1024  # of a grammar as it is asked for
MAX_CHOICES = 10_000
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of ``KINDS`` or ``calls`` is set. Immutable and checked on construction, as far
    as that can be done without a grammar library; JSON is kept as text.

    Raises:
        InvalidRequestError: none or several are set, or a value is empty, too large or not JSON.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # of the whole answer, in the syntax of Rust's regex crate
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark or GBNF
    json_object: bool | None = None  # any JSON object
    structural_tag: str | dict[str, Any] | None = None  # text with parts that follow schemas
    calls: str | None = None  # of tools: ``ForcedCalls.text()`` of jaxllm.parsers
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False  # where a schema does not mention them
    closes: bool = False  # objects that name properties have no others, unless they speak of them
    whitespace_pattern: str | None = None  # what may stand between JSON tokens
    # The field of the user's request that all this came from; errors name it.
    param: str = field(default="structured_outputs", compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if self.json_object is False:
            set_(self, "json_object", None)
        given = [name for name in (*KINDS, "calls") if getattr(self, name) is not None]
        if len(given) != 1:
            which = f"got {' and '.join(given)}" if given else "none is there"
            raise self.invalid(f"it needs exactly one of {', '.join(KINDS)}; {which}")
        if self.json is not None:
            set_(self, "json", self._json_text("json", self.json))
        if self.structural_tag is not None:
            set_(self, "structural_tag", self._json_text("structural_tag", self.structural_tag))
        if self.choice is not None:
            set_(self, "choice", self._choices(self.choice))
        for name in ("regex", "grammar", "calls", "whitespace_pattern"):
            if (text := getattr(self, name)) is not None:
                self._check_text(name, text)

    @property
    def kind(self) -> str:
        return next(name for name in (*KINDS, "calls") if getattr(self, name) is not None)

    def key(self) -> tuple[Any, ...]:
        """Equal for those that ask for the same."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.compare)

    def invalid(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"Invalid '{self.param}': {reason}.", param=self.param, code="invalid_grammar"
        )

    def _json_text(self, name: str, value: str | Mapping[str, Any]) -> str:
        if not isinstance(value, str | Mapping):
            raise self.invalid(f"{name} must be an object or a string that holds one")
        try:
            if isinstance(value, str):
                self._check_text(name, value)
                value = json.loads(value)
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise self.invalid(f"{name} is not valid JSON: {error}") from None
        if not isinstance(value, Mapping | bool) or (name != "json" and isinstance(value, bool)):
            raise self.invalid(f"{name} must hold a JSON object")
        self._check_text(name, text)
        return text

    def _choices(self, value: Sequence[str]) -> tuple[str, ...]:
        choices = tuple(value) if isinstance(value, list | tuple) else ()
        if not choices or not all(isinstance(item, str) and item for item in choices):
            raise self.invalid("choice must be a list of strings, none of them empty")
        if len(choices) > MAX_CHOICES:
            raise self.invalid(f"choice holds {len(choices)} strings; at most {MAX_CHOICES} can be")
        self._check_text("choice", "".join(choices))
        return choices

    def _check_text(self, name: str, value: str) -> None:
        if not isinstance(value, str) or not value:
            raise self.invalid(f"{name} must be a string that is not empty")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise self.invalid(f"{name} is not valid Unicode") from None
        if size > MAX_BYTES:
            raise self.invalid(f"{name} has {size} bytes; at most {MAX_BYTES} are taken")
