"""Objects of a schema that name their properties, and leave open whether there may be others."""

from collections.abc import Iterator
from typing import Any

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema
_LISTS = ("prefixItems", "anyOf", "oneOf")
_ONE = ("items", "additionalProperties")
_OTHERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf")


def close_named(schema: Any) -> None:
    """Let them have no others. Not where schemas are combined with properties: what one part does
    not name another may.
    """
    found = list(_schemas(schema))
    if any("properties" in s and not s.keys().isdisjoint(_COMBINED) for s in found):
        return
    if any(len(s.get("allOf", ())) > 1 for s in found):
        return
    for each in found:
        if "properties" in each and each.keys().isdisjoint(_OTHERS):
            each["additionalProperties"] = False


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """It and all within it; no values, such as those of ``const`` and ``default``."""
    if not isinstance(schema, dict):
        return
    yield schema
    inner: list[Any] = [schema.get(name) for name in _ONE]
    for name in _OF_NAMES:
        if isinstance(named := schema.get(name), dict):
            inner += named.values()
    for name in (*_LISTS, "allOf"):
        if isinstance(listed := schema.get(name), list):
            inner += listed
    for each in inner:
        yield from _schemas(each)
