"""Which objects of a schema are closed, and which are left alone."""

import json
from typing import Any

import pytest

from jaxllm.grammar.closing import close_named

NAMED = {"type": "object", "properties": {"a": {"const": {"properties": {}}}}}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (NAMED, NAMED | {"additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        (NAMED | {"additionalProperties": True}, NAMED | {"additionalProperties": True}),
        (
            {"$defs": {"x": NAMED}, "items": {"$ref": "#/$defs/x"}},
            {
                "$defs": {"x": NAMED | {"additionalProperties": False}},
                "items": {"$ref": "#/$defs/x"},
            },
        ),
        ({"allOf": [NAMED, NAMED]}, {"allOf": [NAMED, NAMED]}),
        (NAMED | {"anyOf": [NAMED]}, NAMED | {"anyOf": [NAMED]}),
    ],
)
def test_objects_that_name_their_properties_are_closed(schema: Any, closed: Any) -> None:
    given = json.loads(json.dumps(schema))
    close_named(given)
    assert given == closed
