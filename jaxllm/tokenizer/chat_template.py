"""Chat messages to prompt text, by the model's own Jinja template. Knows no token ids."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.tokenizer.dialect import in_dialect

if TYPE_CHECKING:
    from jinja2 import Template, nodes


def read_template(root: Path, tokenizer_config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template of a model directory: chat_template.jinja, .json, or in tokenizer_config.json.

    Some models bring several, by name; then the result is a dictionary.
    """
    jinja_file, json_file = root / "chat_template.jinja", root / "chat_template.json"
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8")
    value = tokenizer_config.get("chat_template")
    if json_file.is_file():
        try:
            value = json.loads(json_file.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{json_file} does not hold a chat_template: {error}") from error
    if isinstance(value, list):
        value = {item["name"]: item["template"] for item in value}
    if value is not None and not isinstance(value, str | dict):
        raise ConfigError(f"The chat template in {root} is neither a text nor a list of texts.")
    return value or None


def render(
    messages: Sequence[dict[str, Any]], template: "str | ChatTemplate", **options: Any
) -> str:
    """``ChatTemplate.render`` for a template at hand, as text or compiled."""
    return (ChatTemplate(template) if isinstance(template, str) else template).render(
        messages, **options
    )


class ChatTemplate:
    """A template, compiled on first use, with the special tokens it may name (``bos_token``)."""

    def __init__(
        self, source: str | Mapping[str, str], role_tokens: Mapping[str, str] | None = None
    ):
        named = {"default": source} if isinstance(source, str) else dict(source)
        self._sources = named
        self._role_tokens = dict(role_tokens or {})
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        ``continue_final_message`` ends the text inside the last message, so that the model goes
        on with it. ``variables`` are passed to the template (``enable_thinking=False``).

        Raises:
            InvalidRequestError: content that is not text, or a conversation that the template
                refuses (its own words are in the message).
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=false.",
                param="continue_final_message",
                code="invalid_value",
            )
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        plain = _with_text_content(messages, keep_parts=self._wants_parts)
        given = self._role_tokens | variables
        given |= {
            "tools": list(tools) if tools else None,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }

        def written(messages: list[dict[str, Any]]) -> str:
            return self._run(name, given | {"messages": in_dialect(messages, self.text)})

        text = written(plain)
        return _cut_after_last_message(text, plain, written) if continue_final_message else text

    def _run(self, name: str, variables: dict[str, Any]) -> str:
        try:
            return self._template(name).render(variables)
        except Exception as error:  # the template is foreign code; whatever it meets is its answer
            raise InvalidRequestError(
                f"The model's chat template refuses this conversation: {error}",
                param="messages",
                code="chat_template_error",
            ) from error

    def _template(self, name: str) -> "Template":
        if name not in self._compiled:
            from jaxllm.tokenizer.sandbox import template_environment

            source = self._sources.get(name) or next(iter(self._sources.values()))
            self._compiled[name] = template_environment().from_string(source)
        return self._compiled[name]

    @cached_property
    def text(self) -> str:
        """Of all its templates, behind each other."""
        return "\n".join(self._sources.values())

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself: others would change nothing."""
        from jinja2 import TemplateError, meta

        from jaxllm.tokenizer.sandbox import template_environment

        names: set[str] = set()
        for source in self._sources.values():
            try:
                names |= meta.find_undeclared_variables(template_environment().parse(source))
            except TemplateError:
                continue  # rendering will say what is wrong with it
        return frozenset(names)

    @cached_property
    def _wants_parts(self) -> bool:
        """True if the template loops over a message's content and has no case for plain text."""
        from jinja2 import TemplateError

        from jaxllm.tokenizer.sandbox import template_environment

        source = self._sources.get("default") or next(iter(self._sources.values()))
        try:
            tree = template_environment().parse(source)
        except TemplateError:
            return False  # rendering will say what is wrong with it
        return _loops_over_content(tree) and not _tests_for_string(tree)


def _loops_over_content(tree: "nodes.Template") -> bool:
    from jinja2 import nodes

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in aliases

    aliases: set[str] = set()
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and is_content(assign.node):
            aliases.add(assign.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _tests_for_string(tree: "nodes.Template") -> bool:
    from jinja2 import nodes

    return any(test.name == "string" for test in tree.find_all(nodes.Test))


def _with_text_content(
    messages: Sequence[dict[str, Any]], *, keep_parts: bool
) -> list[dict[str, Any]]:
    """Messages whose content is a string (or a list of text parts, for templates that loop)."""
    if not messages:
        raise InvalidRequestError("messages must not be empty.", param="messages")
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"{where} must be an object with a role.", param=where)
        calls = message.get("tool_calls")
        if calls is not None and not _are_objects(calls):
            where += ".tool_calls"
            raise InvalidRequestError(f"{where} must be a list of objects.", param=where)
        content = message.get("content")
        if isinstance(content, list | tuple):
            texts = [_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
            content = _as_parts(texts) if keep_parts else "\n".join(texts)
        elif isinstance(content, str) and keep_parts:
            content = _as_parts([content])
        elif content is not None and not isinstance(content, str):
            raise InvalidRequestError(
                f"{where}.content must be a string or a list of parts.", param=f"{where}.content"
            )
        plain.append({**message, "content": content} if "content" in message else {**message})
    return plain


def _are_objects(calls: Any) -> bool:
    return isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)


def _as_parts(texts: list[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
        raise InvalidRequestError(
            f"{where} is of type {kind!r}; this model takes only text parts.",
            param=where,
            code="unsupported_content_type",
        )
    return part["text"]


def _cut_after_last_message(
    text: str,
    messages: list[dict[str, Any]],
    written: Callable[[list[dict[str, Any]]], str],
) -> str:
    """The message's words may be in what follows it, too: so a mark tells where they end."""
    content = messages[-1].get("content")
    parts = content if isinstance(content, list) else None
    final = parts[-1]["text"] if parts else content
    if isinstance(final, str) and final.strip():
        mark = next(mark for n in count() if (mark := f"\ue000{n}\ue000") not in text)
        marked = [*parts[:-1], {**parts[-1], "text": final + mark}] if parts else final + mark
        whole = written([*messages[:-1], messages[-1] | {"content": marked}])
        before, found, _ = whole.rpartition(mark)
        # A template that trims does it before the mark, too.
        if found:
            return before if text.startswith(before) else before.rstrip()
    raise InvalidRequestError(
        "continue_final_message: the last message has no text that the chat template keeps.",
        param="messages",
        code="invalid_value",
    )
