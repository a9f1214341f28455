"""Calls of tools in a family's own form -> llguidance's grammar.

What comes is the text of ``jaxllm.parsers.family.ForcedCalls``. Runs in the checking process only.
"""

from collections.abc import Mapping
from typing import Any

from llguidance import LLTokenizer

from jaxllm.grammar.arguments import AsJSON, argument_rules
from jaxllm.grammar.lark import ANY, is_token, spelled, without

MAX_CALLS = 32  # of one answer: a weak model would go on to its last token


def calls_grammar(forced: Mapping[str, Any], tokenizer: LLTokenizer, as_json: AsJSON) -> str:
    """``as_json`` makes of a schema the rule that follows it.

    Raises:
        ValueError: the family's form cannot say what a tool's schema asks for.
    """
    form = forced["form"]
    trigger = "" if forced["required"] else form["trigger"]
    special = tokenizer if forced["special_tokens"] else None
    rules: list[str] = []
    begin = form["begin"] if form["opening"] else form["begin"].removeprefix(trigger)
    end, ends = _end(form["end"], special)
    calls: list[str] = []
    for index, (name, schema) in enumerate(forced["tools"]):
        rules += argument_rules(f"arguments_{index}", form, schema, as_json)
        opened = _sequence(f"{begin}{name}{form['before_arguments']}", special)
        calls.append(f"{opened} arguments_{index} {end}")
    rules.append("call: " + "\n  | ".join(calls))
    most = 0 if ends or not forced["parallel"] else MAX_CALLS - 1
    body = f"call ({_sequence(form['separator'], special)} call){{0,{most}}}" if most else "call"
    if form["opening"]:
        opening = _sequence(form["opening"].removeprefix(trigger), special)
        body = f"{opening} {body} {_sequence(form['closing'], special)}"
    if forced["required"]:
        return "\n".join([*rules, f"start: {body}", ""])
    rules += _prose(_sequence(trigger, special))
    body = body if form["opening"] else "call"  # each call begins with the trigger
    times = f"{{0,{MAX_CALLS}}}" if forced["parallel"] else "?"
    return "\n".join([*rules, f"start: (until_trigger {body}){times} REST?", ""])


def _sequence(text: str, special: LLTokenizer | None) -> str:
    return " ".join(spelled(text, special))


def _end(text: str, special: LLTokenizer | None) -> tuple[str, bool]:
    """Without a token that ends the answer (gpt-oss's): the engine, not the grammar, takes that."""
    pieces = spelled(text, special)
    ends = [f"<[{id}]>" for id in special.eos_tokens] if special is not None else []
    kept = [piece for piece in pieces if piece not in ends]
    return " ".join(kept), len(kept) < len(pieces)


def _prose(trigger: str) -> list[str]:
    """Text up to a call, and text without any."""
    if is_token(trigger):
        return [f"REST: {ANY}", f"until_trigger: REST? {trigger}"]
    prose = without(trigger)
    rules = [f"REST: {prose}", f"UNTIL_TRIGGER: {prose} {trigger}"]
    return [*rules, "until_trigger: UNTIL_TRIGGER"]
