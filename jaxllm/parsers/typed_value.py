"""Arguments that models write as bare text: JSON of them, as the tool's schema has it."""

import json
from collections.abc import Mapping
from typing import Any

from jaxllm.parsers.python_calls import escaped, literal_as_json
from jaxllm.parsers.reader import Emit, Markers, Mismatch, Reader, Steps

MAX_VALUE = 1 << 20  # characters of a value that is no string
_MAX_DEPTH = 16  # of a schema's references and unions
_NAMES: dict[type, tuple[str, ...]] = {
    dict: ("object",),
    list: ("array",),
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
}
ANY = frozenset(name for names in _NAMES.values() for name in names)


def typed_value(r: Reader, types: frozenset[str], closing: Markers, emit: Emit) -> Steps[None]:
    """The text before ``closing``, which is taken too, as JSON of one of ``types``.

    A string is sent while it comes; of anything else the whole must be known first.
    """
    if types == {"string"}:
        emit('"')
        marker = yield from r.until(closing, lambda text: emit(escaped(text)))
        if not marker:
            raise Mismatch
        emit('"')
        yield from r.expect(marker)
    else:
        text = yield from r.text_until(closing, MAX_VALUE)
        yield from r.expect((yield from r.until(closing, emit)))
        emit(as_json(text, types))


def as_json(text: str, types: frozenset[str]) -> str:
    """``text`` itself where it is JSON of one of ``types``, or a literal of Python's (Seed-OSS's
    template writes those); else as a string.
    """
    bare = text.strip()
    if not (kinds := _kinds(bare)) and not bare.startswith("("):  # which is rather a remark
        bare = literal_as_json(bare)
        kinds = _kinds(bare)
    return bare if kinds & (types - {"string"}) else f'"{escaped(text)}"'


def _kinds(text: str) -> frozenset[str]:
    """The schema's names for what ``text`` is as JSON; none if it is not."""
    try:
        return frozenset(_NAMES[type(json.loads(text, parse_constant=_refuse))])
    except (ValueError, RecursionError):
        return frozenset()


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are not JSON


def argument_types(schema: Any, name: str) -> frozenset[str]:
    """Types that the arguments' ``schema`` allows for ``name``; all, if it does not say."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or name not in properties:
        return ANY
    return _types(properties[name], schema, 0) or ANY


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return ANY
    if "$ref" in schema:
        return _types(_referred(schema["$ref"], root), root, depth + 1)
    said = schema.get("type")
    if isinstance(said, str):
        return frozenset({said}) & ANY
    if isinstance(said, list):
        return frozenset(name for name in said if isinstance(name, str)) & ANY
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(name for value in values for name in _NAMES.get(type(value), ()))
    for union in ("anyOf", "oneOf"):
        forms = schema.get(union)
        if isinstance(forms, list):
            return frozenset().union(
                *(_types(form, root, depth + 1) for form in forms[:_MAX_DEPTH])
            )
    return ANY


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for part in reference.split("/")[1:] if isinstance(reference, str) else ():
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
