"""Rules for a call's arguments, in the ways in which families write them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.grammar.lark import literal, without

type Schema = Mapping[str, Any]
type AsJSON = Callable[[Schema], str]  # a schema -> the rule that follows it

_NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_TOP = _NOTES | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_TOP |= {"$schema", "$id", "strict"}
_STRING = _NOTES | {"type", "minLength", "maxLength", "enum", "const"}
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAGGED = re.compile(r"[^<>\s]+")
_MAX_REFERENCES = 16  # behind each other


def argument_rules(rule: str, form: Mapping[str, Any], given: Any, as_json: AsJSON) -> list[str]:
    """Definitions of ``rule`` and of what it needs. ``given``: the arguments' schema.

    Raises:
        ValueError: the schema is none of an object, or asks for what this form cannot say.
    """
    schema = _closed(given)
    if form["arguments"] == "json":
        return [f"{rule}: {as_json(schema)}"]
    if unknown := schema.keys() - _TOP:
        raise ValueError(f"the model does not write arguments as JSON, so {min(unknown)} cannot be")
    of_form = _python if form["arguments"] == "python" else _tagged
    return of_form(rule, form, schema, as_json)


def _closed(given: Any) -> dict[str, Any]:
    """An object's schema; where it names properties, others may not come unless it says so."""
    if given is None:
        given = {"properties": {}}
    if not isinstance(given, Mapping) or given.get("type", "object") != "object":
        raise ValueError("parameters must be the schema of an object")
    schema = {"type": "object", **given}
    if schema.keys() <= _TOP and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _python(rule: str, form: Mapping[str, Any], schema: Schema, as_json: AsJSON) -> list[str]:
    """``a=1, b="x"``: what JSON says, Python's literals of calls say in the same way."""
    rules: list[str] = []
    arguments: list[tuple[str, bool]] = []
    for index, (name, value, needed) in enumerate(_properties(schema, _KEYWORD)):
        rules.append(f"{rule}_{index}: {literal(f'{name}=')} {as_json(value)}")
        arguments.append((f"{rule}_{index}", needed))
    count = len(arguments)
    for index, (argument, needed) in enumerate(arguments):
        first = f"{argument} {rule}_more_{index + 1}"
        rules.append(f"{rule}_from_{index}: {first}" + _or(f"{rule}_from_{index + 1}", not needed))
        rules.append(
            f'{rule}_more_{index}: (", " {argument}){"" if needed else "?"} {rule}_more_{index + 1}'
        )
    rules += [f'{rule}_from_{count}: ""', f'{rule}_more_{count}: ""']
    return [*rules, f"{rule}: {rule}_from_0"]


def _or(rule: str, there: bool) -> str:
    return f" | {rule}" if there else ""


def _tagged(rule: str, form: Mapping[str, Any], schema: Schema, as_json: AsJSON) -> list[str]:
    """A tag for each. Strings stand bare, up to the text that ends the tag."""
    rules: list[str] = []
    parts: list[str] = []
    for index, (name, value, needed) in enumerate(_properties(schema, _TAGGED)):
        before, _, after = form["tag"].replace("{name}", name).partition("{value}")
        argument = f"{rule}_{index}"
        choices: list[str] = []
        for branch in _branches(value, value):
            if branch.get("type") != "string":
                choices.append(f"{as_json(_with_definitions(branch, value))} {literal(after)}")
            elif "const" in branch or "enum" in branch:
                texts = branch["enum"] if "enum" in branch else [branch["const"]]
                choices += [literal(_bare(text, after) + after) for text in texts]
            else:
                rules.append(f"{argument.upper()}: {_text(branch, after)} {literal(after)}")
                choices.append(argument.upper())
        rules.append(f"{argument}: {literal(before)} ({' | '.join(choices)})")
        parts.append(argument if needed else f"{argument}?")
    return [*rules, f"{rule}: {' '.join(parts) or '""'}"]


def _properties(schema: Schema, names: re.Pattern[str]) -> list[tuple[str, dict[str, Any], bool]]:
    """Each with the schema's definitions, and whether it must come."""
    required = schema.get("required") or ()
    properties = schema.get("properties") or {}
    if unsaid := [name for name in required if name not in properties]:
        raise ValueError(f"the model does not write JSON, so {unsaid[0]!r} needs a schema")
    found: list[tuple[str, dict[str, Any], bool]] = []
    for name, value in properties.items():
        if not names.fullmatch(name):
            raise ValueError(f"the model cannot write the argument {name[:64]!r}")
        value = value if isinstance(value, Mapping) else {}
        found.append((name, _with_definitions(value, schema), name in required))
    return found


def _with_definitions(value: Schema, root: Schema) -> dict[str, Any]:
    return {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **value}


def _branches(schema: Schema, root: Schema, depth: int = 0) -> list[dict[str, Any]]:
    """The types that a value may have, each by itself.

    Bare text is read as a string only if it is nothing else that the schema allows: next to
    strings stand only types that are then told apart without looking at their values.
    """
    schema = {key: schema[key] for key in schema if key not in ("$defs", "definitions")}
    if depth > _MAX_REFERENCES:
        raise ValueError("references lead in a circle")
    if (reference := schema.get("$ref")) is not None:
        return _branches(_referred(reference, root), root, depth + 1)
    forms = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(forms, list):
        found = [b for form in forms for b in _branches(form, root, depth + 1)]
    elif isinstance(schema.get("type"), list):
        found = [{**schema, "type": name} for name in schema["type"]]
    else:
        found = [schema if "type" in schema else _typed(schema)]
    for branch in found if len(found) > 1 and any(map(_is_string, found)) else ():
        plain = branch.keys() <= _NOTES | {"type"} and branch["type"] not in ("object", "array")
        if not plain and not _is_string(branch):
            raise ValueError("the model writes strings bare, and could not tell them from others")
    return found


def _typed(schema: dict[str, Any]) -> dict[str, Any]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    texts = [isinstance(value, str) for value in values]
    if not values:
        if schema.keys() <= _NOTES:
            return {**schema, "type": "string"}
        return schema
    if any(texts) and not all(texts):
        raise ValueError("the model writes strings bare, and could not tell them from others")
    return {**schema, "type": "string"} if all(texts) else schema


def _is_string(branch: Schema) -> bool:
    return branch.get("type") == "string"


def _referred(reference: Any, root: Schema) -> Schema:
    found: Any = root
    for part in str(reference).removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"the reference {str(reference)[:64]!r} leads nowhere")
    return found


def _bare(text: Any, after: str) -> str:
    if not isinstance(text, str) or after.strip() in text:
        raise ValueError("the model cannot write one of the values")
    return text


def _text(branch: Schema, after: str) -> str:
    """A terminal of a string's text."""
    if unknown := branch.keys() - _STRING:
        raise ValueError(f"the model writes strings bare, so {min(unknown)} cannot be followed")
    low, high = branch.get("minLength", 0), branch.get("maxLength", "")
    bounds = f" & /(?s:.{{{low},{high}}})/" if low or high != "" else ""
    return f"({without(literal(after.strip()))}{bounds})"
