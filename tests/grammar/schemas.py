"""Random JSON schemas, small enough that an answer at temperature 1 comes to an end."""

import json
import random
from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]
FORMATS = ("date", "uuid", "ipv4", "ipv6", "email")  # those that the judge knows, too
PATTERNS = ("^[a-z]{1,4}$", "^(x|yy)+z{0,3}$", r"^\d{3}-\d{2}$", "^[A-F0-9]{2,6}$", r"^\w{1,5}$")
UNSUPPORTED: tuple[Schema, ...] = (
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"maxLength": 3}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "null"}},
    {"type": "object", "propertyNames": {"maxLength": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "string", "format": "colour"},
    {"type": "colour"},
    {"$ref": "https://example.org/schema"},
    {"$ref": "#/$defs/nobody"},
    {"type": "integer", "minimum": 5, "maximum": 4},
)


def some_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A supported one."""
    makers: list[Callable[[random.Random, int], Schema]] = [
        _string, _integer, _number, _enum, _plain, _constant,
    ]  # fmt: skip
    if depth > 0:
        makers += [_object, _object, _object, _array, _any_of, _tuple]
    schema = rng.choice(makers)(rng, depth)
    if rng.random() < 0.2:
        schema |= {"title": "T", "description": "what it is", "examples": [{"$ref": "no"}]}
    return schema


def some_document(rng: random.Random) -> Schema:
    """A supported schema; some have definitions, some of these refer to themselves."""
    if rng.random() < 0.8:
        return some_schema(rng)
    rest = {"$ref": "#/$defs/node"}
    node = {
        "type": "object",
        "properties": {"v": some_schema(rng, 0), "next": {"anyOf": [{"type": "null"}, rest]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": rest, "maxItems": 2, "$defs": {"node": node}}


def unsupported_document(rng: random.Random) -> Schema:
    """One with something in it that must be refused."""
    wrong = rng.choice(UNSUPPORTED)
    for _ in range(rng.randrange(3)):
        around = {"type": "object", "properties": {"a": wrong}, "required": ["a"]}
        wrong = rng.choice((around, {"type": "array", "items": wrong, "minItems": 1}))
    return wrong


def follows(schema: Schema, text: str) -> bool:
    """Whether ``text`` is JSON that ``schema`` allows, formats included. Raises ValueError: it is
    not JSON.
    """
    value = json.loads(text, parse_constant=_refuse)
    checker = Draft202012Validator.FORMAT_CHECKER
    return Draft202012Validator(schema, format_checker=checker).is_valid(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.randrange(3)
    if kind == 0:
        low = rng.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(6)}
    if kind == 1:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    return {"type": "string", "format": rng.choice(FORMATS)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randrange(5000)}
    if rng.random() < 0.2:
        schema = {"type": "integer", "multipleOf": rng.choice((2, 3, 10)), "minimum": 0}
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-100, 100)
    bounds = {"exclusiveMinimum": low, "maximum": low + rng.randrange(1, 100)}
    return {"type": "number"} | (bounds if rng.random() < 0.7 else {})


def _enum(rng: random.Random, depth: int) -> Schema:
    values = ["a", "b c", "\u00e9\n", '"', "\u4e2d\u6587", 1, -2.5, None, True, ["x"], {"k": 1}]
    return {"enum": rng.sample(values, rng.randrange(1, 6))}


def _constant(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(("x", 7, None, [1, 2], {"a": {"b": []}}, "\\ / \t"))}


def _plain(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["a", "b", "c d", "\u00fc", "", "x-y", "long_name_of_a_property"], 4)
    properties = {name: some_schema(rng, depth - 1) for name in names[: rng.randrange(5)]}
    schema: Schema = {"type": "object", "properties": properties}
    schema["required"] = [name for name in properties if rng.random() < 0.6]
    schema["additionalProperties"] = False
    if rng.random() < 0.1:
        del schema["additionalProperties"]
        schema["patternProperties"] = {"^q[0-9]$": {"type": "boolean"}}
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    items = some_schema(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(3)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    parts = [some_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [some_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
