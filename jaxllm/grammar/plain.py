"""Which grammars compile at once, whatever they say: they need not wait behind those that may not.

Reads JSON; knows no grammar library.
"""

import json
from collections.abc import Iterable
from typing import Any

from jaxllm.grammar.structured_outputs import StructuredOutputsParams

MAX_BYTES = 16 * 1024
MAX_LENGTH = 256  # of a string: its characters are counted
MAX_BOUND = 2**53  # of a number: its digits are
_ABOUT = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
_ABOUT |= {"deprecated", "readOnly", "writeOnly"}
_SAYS_LITTLE = _ABOUT | {"$ref", "type", "enum", "const", "required"}


def is_plain(spec: StructuredOutputsParams) -> bool:
    """Objects, lists, alternatives, numbers and strings within few bytes: no patterns, no
    multiples, no counting of entries, no schemas that must hold together.
    """
    if spec.whitespace_pattern is not None:
        return False
    if spec.json_object or spec.choice is not None:
        return sum(map(len, spec.choice or ())) <= MAX_BYTES
    text = spec.json if spec.json is not None else spec.calls
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        return False
    value = json.loads(text)
    schemas = [value] if spec.calls is None else [schema for _, schema in value["tools"]]
    return _are_plain(schemas)


def _are_plain(schemas: Iterable[Any]) -> bool:
    return all(_is_plain_schema(schema) for schema in schemas)


def _is_plain_schema(schema: Any) -> bool:
    if isinstance(schema, bool):
        return True
    if not isinstance(schema, dict):
        return False
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions"):
            plain = isinstance(value, dict) and _are_plain(value.values())
        elif key == "anyOf":
            plain = isinstance(value, list) and _are_plain(value)
        elif key in ("items", "additionalProperties"):
            plain = _is_plain_schema(value)
        elif key in ("minLength", "maxLength"):
            plain = isinstance(value, int) and value <= MAX_LENGTH
        elif key in ("minimum", "maximum"):
            plain = isinstance(value, int) and abs(value) <= MAX_BOUND
        else:
            plain = key in _SAYS_LITTLE
        if not plain:
            return False
    return True
