"""Each way of asking for structure, through the whole engine: answers to one prompt, scored."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from tests.grammar.rounds import allowed_of

COLOURS = ["red", "light green", "blue"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": COLOURS}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def matches(pattern: str) -> Callable[[str], Any]:
    return re.compile(pattern).fullmatch


KINDS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "regex": ({"regex": r"[a-c]{2,4}-[0-9]{3}"}, matches(r"[a-c]{2,4}-[0-9]{3}")),
    "choice": ({"choice": COLOURS}, COLOURS.__contains__),
    "json": ({"json": SCHEMA}, lambda text: json.loads(text)["b"] in COLOURS),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "Lark": (
        {"grammar": 'start: "a" (", " NUMBER){1,3}\nNUMBER: /[0-9]{1,2}/'},
        matches(r"a(, [0-9]{1,2}){1,3}"),
    ),
    "GBNF": (
        {"grammar": 'root ::= "yes" | "no " word\nword ::= [a-z] [a-z]'},
        matches(r"yes|no [a-z]{2}"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_what_was_asked_for(llm: LLM, kind: str) -> None:
    asked, follows = KINDS[kind]
    params = SamplingParams(
        n=6, temperature=1.0, seed=1, max_tokens=200, logprobs=1,
        structured_outputs=StructuredOutputsParams(**asked),
    )  # fmt: skip
    prompt = "The beginning of this prompt has been computed before. " * 2
    first, again = llm.generate([prompt], params), llm.generate([prompt], params)
    assert again[0].num_cached_tokens
    assert [a.token_ids for a in again[0].outputs] == [a.token_ids for a in first[0].outputs]
    ended = [answer for answer in first[0].outputs if answer.finish_reason == "stop"]
    assert len(first[0].outputs) == 6 and len(ended) >= (1 if kind == "json_object" else 6)
    for answer in ended:
        assert follows(answer.text), answer.text
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)


TAG = {
    "structures": [
        {"begin": "<f=ask>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=say>", "schema": {"type": "null"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Just text, and < f", "$"),
        ('Well. <f=ask>{"a": 7, "b": "red"}</f> And <f=say>null</f>.', "$"),
        ("<f=tell", "<f="),
        ("<f=ask>{}", "<f=ask>{"),
        ('<f=ask>{"a": 100', '<f=ask>{"a": 10'),
        ('<f=ask>{  "a"', "<f=ask>{ "),  # a model may not go on with blanks
        ("<f=say>null</g>", "<f=say>null</"),
    ],
)
def test_tags_in_free_text(llm: LLM, text: str, allowed: str) -> None:
    spec = StructuredOutputsParams(structural_tag=TAG)
    assert allowed_of(llm, spec, text) == (text + "$" if allowed == "$" else allowed)
