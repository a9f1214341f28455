"""Calls and thoughts that a model's own published template writes are read as what they were, and
the template tells which parsers read them.
"""

import json
import re
from typing import Any

import pytest

from jaxllm.parsers.choice import REASONING_MARKS, TOOL_MARKS, Parsers, choose, marked
from jaxllm.tokenizer.chat_template import ChatTemplate
from server.openai.conversation import with_arguments
from tests.parsers.transcripts import GOLDEN, Said, parse

PUBLISHED = {  # the parsers of its tools and its thoughts, and whether it writes thoughts of calls
    "Apriel-1.5": ("apriel", "apriel", False),
    "DeepSeek-R1-Distill-Llama-8B": ("deepseek_v3", "deepseek_v3", False),
    "DeepSeek-V3.1": ("deepseek_v31", "deepseek_v3", False),
    "GLM-4.6": ("glm45", "glm45", True),
    "Ministral-3-14B-Reasoning-2512": ("mistral_v11", "mistral", False),
    "Mistral-Nemo-Instruct-2407": ("mistral", None, False),
    "Qwen3-0.6B": ("hermes", "qwen3", True),
    "Qwen3-Coder": ("qwen3_coder", None, False),
    "Seed-OSS": ("seed_oss", "seed_oss", True),
    "gpt-oss-120b": ("openai", "openai_gptoss", True),
    "granite-3.3-2b-instruct": ("granite", "granite33", False),
    "granite-4.0": ("granite", None, False),
}
KNOWS_NO_CALLS = "granite-3.3-2b-instruct"

# Llama's are not published under a licence that lets them stand here. What they say of a call:
LLAMA3 = (
    "{%- for m in messages %}<|start_header_id|>assistant<|end_header_id|>"
    "{%- set c = m.tool_calls[0].function %}"
    '{{- \'{"name": "\' + c.name + \'", "parameters": \' }}{{ c.arguments | tojson }}{{ "}" }}'
    "{%- endfor %}"
)


def schema(**types: str) -> dict[str, Any]:
    properties = {name: {"type": type_, "description": "..."} for name, type_ in types.items()}
    return {"type": "object", "properties": properties, "required": []}


TOOLS = {
    "search": schema(query="string", options="object", exact="boolean", limit="integer"),
    "get_weather": schema(city="string"),
    "now": schema(),
}
CALLS: list[tuple[str, Any]] = [
    ("search", {"query": 'a "b"\n{c é', "options": {"k": [1, None]}, "exact": True, "limit": 3}),
    ("get_weather", {"city": "Zürich"}),
    ("now", {}),
]
THOUGHTS = "It may rain."


def template(name: str) -> ChatTemplate:
    source = (GOLDEN / "templates" / f"{name}.jinja").read_text()
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def asked(calls: list[tuple[str, Any]]) -> dict[str, Any]:
    """The message of an assistant that thinks and calls."""
    told = [
        {
            "type": "function",
            "id": f"abcdefgh{place}",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for place, (name, arguments) in enumerate(calls)
    ]
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": THOUGHTS,
        "tool_calls": [with_arguments(call) for call in told],
    }


def written(name: str, calls: list[tuple[str, Any]]) -> tuple[str, str]:
    """A prompt for an answer and the answer, where it stands in the history."""
    described = [
        {"type": "function", "function": {"name": tool, "description": "...", "parameters": of}}
        for tool, of in TOOLS.items()
    ]
    history: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    before, prompt, all_of_it = (
        template(name).render(messages, tools=described, add_generation_prompt=generate)
        for messages, generate in (
            (history, False),
            (history, True),
            ([*history, asked(calls)], False),
        )
    )
    answer = all_of_it.removeprefix(before)
    for begun in re.split(r"(?=[<\[])", prompt.removeprefix(before)):
        if not answer.startswith(begun):
            break
        before, answer = before + begun, answer.removeprefix(begun)
    return before, answer


def said_in(answer: str, prompt: str, parsers: Parsers) -> Said:
    parser = parsers.answer(prompt, TOOLS)
    assert parser is not None
    return Said.of(parse(parser, [answer]))


def calls_of(said: Said) -> list[tuple[str, Any]]:
    return [(call["name"], json.loads(call["arguments"])) for call in said.calls]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_tells_the_parsers(name: str) -> None:
    tool, reasoning, _ = PUBLISHED[name]
    assert marked(TOOL_MARKS, template(name).text) == tool
    assert marked(REASONING_MARKS, template(name).text) == reasoning


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != KNOWS_NO_CALLS])
@pytest.mark.parametrize("calls", [CALLS[:1], CALLS], ids=["one call", "several"])
def test_what_a_published_template_writes_is_read(name: str, calls: list[tuple[str, Any]]) -> None:
    prompt, answer = written(name, calls)
    said = said_in(answer, prompt, choose("auto", "auto", template(name).text))
    assert calls_of(said) == calls
    assert said.reasoning == (THOUGHTS if PUBLISHED[name][2] else "")
    assert not any(tool in said.content for tool in TOOLS)


def test_llama_3_is_told_a_call_a_message() -> None:
    text = ChatTemplate(LLAMA3).render([asked(CALLS)], add_generation_prompt=False)
    answers = text.split("<|start_header_id|>assistant<|end_header_id|>")[1:]
    parsers = choose("auto", "auto", LLAMA3)
    assert [calls_of(said_in(answer, "", parsers)) for answer in answers] == [[c] for c in CALLS]


def test_results_stand_behind_their_calls_where_each_has_its_message() -> None:
    call = asked(CALLS)
    results = [
        {"role": "tool", "tool_call_id": id, "content": f"result {id[-1]}"}
        for id in ("abcdefgh1", "abcdefgh0", ["no", "name"])  # clients send what they like
    ]
    prompt = template("gpt-oss-120b").render([{"role": "user", "content": "Hi"}, call, *results])
    order = ["search", "result 0", "get_weather", "result 1", "now", "result name"]
    assert re.findall(r"to=functions\.(\w+)<|(result \w+)", prompt) == [
        ("", text) if text.startswith("result") else (text, "") for text in order
    ]
    assert prompt.count(THOUGHTS) == 1


def test_what_was_said_before_a_call_stands_for_its_thoughts() -> None:
    call = asked(CALLS[:1]) | {"content": "One moment."}
    prompt = template("gpt-oss-120b").render([{"role": "user", "content": "Hi"}, call])
    assert "analysis<|message|>One moment.<|end|>" in prompt and THOUGHTS not in prompt
