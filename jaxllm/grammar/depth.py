"""Refuses what would make a parser recurse deeply, or look elsewhere. Reads text, parses nothing
but JSON; knows no grammar library.
"""

import json
import re
from typing import Any

from jaxllm.grammar.structured_outputs import StructuredOutputsParams

# Of brackets in one another: of JSON as in the server's bodies; elsewhere some may be text.
MAX_DEPTH = {
    "json": 64,
    "structural_tag": 64,
    "calls": 64 + 4,  # schemas within a list of tools
    "regex": 200,
    "grammar": 200,
    "whitespace_pattern": 8,
}
_BRACKETS = re.compile(r"\\.|[()\[\]{}]", re.DOTALL)
_DATA = ("const", "enum", "default", "examples", "example")  # keywords whose values are no schemas


def check_depth(spec: StructuredOutputsParams) -> None:
    """Raises InvalidRequestError: too deep, or a schema with a reference out of itself."""
    for name, deepest in MAX_DEPTH.items():
        text = getattr(spec, name)
        if text is not None and _nesting(text) > deepest:
            raise spec.invalid(f"{name} is nested more than {deepest} levels deep")
    for text in (spec.json, spec.structural_tag, spec.calls):
        if text is not None and "$ref" in str(text):
            _check_references(spec, json.loads(str(text)))


def _nesting(text: str) -> int:
    """At least the depth of brackets. One within a string or a class counts as well, since where
    those end is the grammar's affair.
    """
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        bracket = match[0]
        if bracket in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif len(bracket) == 1:
            depth = max(depth - 1, 0)
    return deepest


def _check_references(spec: StructuredOutputsParams, value: Any) -> None:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(item, str):
            if not item.startswith("#"):
                raise spec.invalid(
                    f"$ref {item[:64]!r} leads out of the schema; only references that begin with "
                    "# are followed"
                )
        elif isinstance(item, dict | list) and key not in _DATA:
            _check_references(spec, item)
