"""What was asked for -> llguidance's own form of a grammar. Runs in the checking process only."""

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer, StructTag, grammar_from

from jaxllm.errors import InvalidRequestError
from jaxllm.grammar.arguments import AsJSON
from jaxllm.grammar.calls import calls_grammar
from jaxllm.grammar.closing import close_named
from jaxllm.grammar.structured_outputs import StructuredOutputsParams

# A blank, or a line break with indentation. Bounded: a model that once prefers blanks to an end
# would otherwise fill its answer with them.
WHITESPACE = r"\x20?|\n[\x20\t]{0,40}"


def to_llguidance(spec: StructuredOutputsParams, tokenizer: LLTokenizer) -> str:
    """The grammar as text for ``LLMatcher``. Whether it makes sense only a matcher finds out.
    Calls of tools are marked by special tokens, which ``tokenizer`` knows.

    Raises:
        InvalidRequestError: it cannot be written so; says why.
    """
    try:
        if spec.calls is not None:
            return calls_grammar(json.loads(spec.calls), tokenizer, _inner_json(spec))
        return _CONVERTERS[spec.kind](spec)
    except InvalidRequestError:
        raise
    except (ValueError, AssertionError, KeyError, TypeError, RecursionError) as error:
        raise spec.invalid(f"{spec.kind} cannot be read: {str(error)[:300]}") from None


def _json(spec: StructuredOutputsParams) -> str:
    schema = json.loads(str(spec.json))
    if schema is False:
        raise spec.invalid("the schema false allows nothing")
    return _schema_grammar(spec, {} if schema is True else schema)


def _schema_grammar(spec: StructuredOutputsParams, schema: dict[str, Any]) -> str:
    if spec.disable_additional_properties:
        _close_objects(schema)
    elif spec.closes:
        close_named(schema)
    # Overrides go before whatever the schema says of itself under "x-guidance".
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_options(spec))  # pyright: ignore[reportArgumentType]


def _options(spec: StructuredOutputsParams) -> dict[str, Any]:
    if spec.disable_any_whitespace:
        return {"lenient": False, "whitespace_flexible": False}
    return {"lenient": False, "whitespace_pattern": spec.whitespace_pattern or WHITESPACE}


def _inner_json(spec: StructuredOutputsParams) -> AsJSON:
    """Of schemas within a grammar."""
    return lambda schema: f"%json {json.dumps({**schema, 'x-guidance': _options(spec)})}"


def _close_objects(schema: Any) -> None:
    if isinstance(schema, dict):
        is_object = schema.get("type") == "object" or "properties" in schema
        if is_object and "additionalProperties" not in schema and "patternProperties" not in schema:
            schema["additionalProperties"] = False
    for value in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(value, dict | list):
            _close_objects(value)


def _json_object(spec: StructuredOutputsParams) -> str:
    return _schema_grammar(spec, {"type": "object"})


def _regex(spec: StructuredOutputsParams) -> str:
    return LLMatcher.grammar_from_regex(str(spec.regex))


def _choice(spec: StructuredOutputsParams) -> str:
    return grammar_from("choice", json.dumps(spec.choice))


def _grammar(spec: StructuredOutputsParams) -> str:
    return grammar_from("grammar", str(spec.grammar))


def _structural_tag(spec: StructuredOutputsParams) -> str:
    """vLLM's form: {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}."""
    value = json.loads(str(spec.structural_tag))
    if "structures" not in value or "triggers" not in value:
        raise spec.invalid("structural_tag needs structures and triggers")
    tags: list[StructTag] = []
    for structure in value["structures"]:
        begin = structure["begin"]
        trigger = next((t for t in value["triggers"] if begin.startswith(t)), None)
        if not trigger:
            raise spec.invalid(f"structural_tag has no trigger that {begin[:64]!r} begins with")
        inner = {**structure["schema"], "x-guidance": _options(spec)}
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=inner, end=structure["end"]))
    return StructTag.to_grammar(tags, assume_special=False)


_CONVERTERS = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
