"""A conversation's calls, written by a family's template, are read as the calls they were.

The loops say what the families' published templates say of calls, and no more than that.
"""

import json
from typing import Any

import pytest

from jaxllm.parsers.choice import TOOL_PARSERS
from jaxllm.parsers.machine import Machine
from jaxllm.tokenizer.chat_template import ChatTemplate
from server.openai.conversation import with_arguments
from tests.parsers.transcripts import TOOLS, Said, parse

CALLS: list[tuple[str, Any]] = [
    ("search", {"query": 'a "b"\n{c é', "options": {"k": [1, None]}, "exact": True, "limit": 3}),
    ("get_weather", {"city": "Zürich"}),
    ("now", {}),
]
LOOPS = {  # what stands for each call ``c`` of ``calls``
    "hermes": (
        '\n<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}'
        "\n</tool_call>"
    ),
    "llama3_json": '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}',
    "mistral": (
        "{{ '[TOOL_CALLS] [' if loop.first }}{{ c | tojson }}{{ ']' if loop.last else ', ' }}"
    ),
    "mistral_v11": "{{ '[TOOL_CALLS]' + c.name + '[ARGS]' + c.arguments | tojson }}",
    "deepseek_v3": (
        "{{ '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}<｜tool▁call▁begin｜>function"
        "<｜tool▁sep｜>{{ c.name + '\n```json\n' + c.arguments + '\n```<｜tool▁call▁end｜>' }}"
        "{{ '<｜tool▁calls▁end｜>' if loop.last }}"
    ),
    "deepseek_v31": (
        "{{ '<｜tool▁calls▁begin｜>' if loop.first }}<｜tool▁call▁begin｜>{{ c.name }}"
        "<｜tool▁sep｜>{{ '' + c.arguments }}<｜tool▁call▁end｜>"
        "{{ '<｜tool▁calls▁end｜>' if loop.last }}"
    ),
    "glm45": (
        "\n<tool_call>{{ c.name }}{% for k, v in c.arguments.items() %}"
        "\n<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}\n</tool_call>"
    ),
    "qwen3_coder": (
        "\n<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments | items %}"
        "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>"
    ),
    "openai": (
        "{{ '' if loop.first else '<|start|>assistant' }}<|channel|>commentary to=functions."
        "{{ c.name }} <|constrain|>json<|message|>{{ c.arguments | tojson }}<|call|>"
    ),
}


@pytest.mark.parametrize("family", LOOPS)
def test_what_the_template_writes_is_read(family: str) -> None:
    calls = CALLS[:1] if family == "llama3_json" else CALLS  # whose template takes no more
    asked = [
        {"function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for name, arguments in calls
    ]
    template = (
        "{% for m in messages %}{% for call in m.tool_calls %}{% set c = call.function %}"
        f"{LOOPS[family]}{{% endfor %}}{{% endfor %}}"
    )
    message = {"role": "assistant", "content": "", "tool_calls": list(map(with_arguments, asked))}
    text = ChatTemplate(template).render([message], add_generation_prompt=False)
    said = Said.of(parse(Machine(TOOL_PARSERS.load(family).grammar, TOOLS), [text]))
    assert [(call["name"], json.loads(call["arguments"])) for call in said.calls] == calls
    assert said.content == ""
