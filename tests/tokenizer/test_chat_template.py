"""Chat templates: the same text as transformers, and no way out of the sandbox."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jaxllm.errors import InvalidRequestError
from jaxllm.tokenizer.chat_template import ChatTemplate, render
from jaxllm.tokenizer.sandbox import template_environment

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% set content = m.content %}"
    "[{{ m.role }}{% for part in content %}|{{ part.text }}{% endfor %}]{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}PART{% endfor %}{% endif %}{% endfor %}"
)
FANCY = (
    "{%- set ns = namespace(n=0) -%}\n"
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {%- set ns.n = ns.n + 1 %}\n"
    "    {%- generation %}{{ ns.n }}:{{ m.content | trim }}{% endgeneration %}\n"
    "{%- endfor %}{{ tools | tojson(indent=2) if tools }}{{ {'a': '<é&>'} | tojson }}"
)
USER: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " <b>Hi</b> & é "},
    {"role": "assistant", "content": "Hello "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}]

GOLDEN = Path(__file__).parents[1] / "golden"
NO_PARAMETERS = {"type": "object", "properties": {}, "required": []}


@pytest.mark.parametrize("template", [CHATML, FANCY, EITHER])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_as_transformers_does(template: str, generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {"add_generation_prompt": generation_prompt, "tools": TOOLS}
    (expected,), _ = render_jinja_template([USER], chat_template=template, **options)
    assert render(USER, template, **options) == expected


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.glob("templates/*.jinja")), ids=lambda path: path.stem
)
def test_published_templates_render_as_in_transformers(path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    function = {"name": "f", "description": "...", "parameters": NO_PARAMETERS}
    tools: list[Any] = [{"type": "function", "function": function}]
    turns = [*USER, {"role": "user", "content": "And?"}]
    tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    template = path.read_text()
    (expected,), _ = render_jinja_template(
        [turns], chat_template=template, tools=tools, add_generation_prompt=True, **tokens
    )
    assert ChatTemplate(template, tokens).render(turns, tools=tools) == expected


def test_variables_and_special_tokens() -> None:
    template = ChatTemplate("{{ bos_token }}{{ enable_thinking }}", {"bos_token": "<s>"})
    assert template.render(USER, enable_thinking=False) == "<s>False"


def test_parts_become_text_unless_the_template_loops() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "three"}]
    assert "user\none\ntwo<|im_end|>" in render(messages, CHATML)
    assert render(messages, PARTS) == "[user|one|two][user|three]"
    assert render(messages, EITHER) == "one\ntwothree"
    assert messages[1]["content"] == "three"


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "text"}, {}, 3])
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render([{"role": "user", "content": [part]}], CHATML)
    assert caught.value.code == "unsupported_content_type"
    assert caught.value.param == "messages[0].content[0]"


CALLING: dict[str, Any] = {"role": "assistant", "content": None}
NO_CALLS = [CALLING | {"tool_calls": calls} for calls in (5, "ab", {"a": 1, "b": 2}, [1, 2])]


@pytest.mark.parametrize(
    "messages",
    [[], [{}], ["x"], [{"role": "user", "content": 3}], *([message] for message in NO_CALLS)],
)
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(InvalidRequestError):
        render(messages, CHATML)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{% for %}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.__init__.__globals__ }}", "refuses"),
        ("{% include 'x' %}", "refuses"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses"),
    ],
)
def test_template_errors_and_escapes(template: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        render(USER, template)


def test_continue_final_message() -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(USER, CHATML, **options).endswith("<|im_start|>assistant\nHello ")
    for final in ("<", "|", ">", "end", "im_end|>", "\ue0000\ue000"):  # as in what follows it
        last = [{"role": "assistant", "content": final}]
        assert render([*USER, *last], CHATML, **options).endswith(f"assistant\n{final}")
    trimmed = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"
    assert render(USER, trimmed, **options).endswith("<Hello")
    with pytest.raises(InvalidRequestError, match="no text"):
        render([{"role": "assistant", "content": " "}], CHATML, **options)
    with pytest.raises(InvalidRequestError, match="add_generation_prompt"):
        render(USER, CHATML, continue_final_message=True)


def test_clock_is_a_parameter() -> None:
    environment = template_environment(now=lambda: datetime(2024, 7, 26))
    template = environment.from_string("{{ strftime_now('%d %b %Y') }}")
    assert template.render() == "26 Jul 2024"
