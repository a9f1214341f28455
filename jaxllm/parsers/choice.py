"""Which parsers read a model's answers: by name, or by what its chat template writes.

A new one is a file and a line in ``TOOL_PARSERS`` or ``REASONING_PARSERS``, and one in ``MARKS``
if a template can tell it. Packages add theirs as entry points of ``GROUPS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.parsers.family import ReasoningParser, ToolParser
from jaxllm.parsers.machine import AnswerParser, Machine
from jaxllm.registry import Registry

AUTO, NONE = "auto", "none"
GROUPS = {ToolParser: "jaxllm.tool_parsers", ReasoningParser: "jaxllm.reasoning_parsers"}

TOOL_PARSERS: Registry[ToolParser] = Registry(
    "tool-call parser",
    {
        "apriel": "jaxllm.parsers.tool.apriel:APRIEL",
        "deepseek_v3": "jaxllm.parsers.tool.deepseek:DEEPSEEK_V3",
        "deepseek_v31": "jaxllm.parsers.tool.deepseek:DEEPSEEK_V31",
        "glm4": "jaxllm.parsers.tool.glm4:GLM4",
        "glm45": "jaxllm.parsers.tool.glm4:GLM45",
        "granite": "jaxllm.parsers.tool.granite:GRANITE",
        "hermes": "jaxllm.parsers.tool.hermes:HERMES",
        "llama3_json": "jaxllm.parsers.tool.llama3_json:LLAMA3_JSON",
        "mistral": "jaxllm.parsers.tool.mistral:MISTRAL",
        "mistral_v11": "jaxllm.parsers.tool.mistral:MISTRAL_V11",
        "openai": "jaxllm.parsers.tool.harmony:OPENAI",
        "phi4_mini_json": "jaxllm.parsers.tool.phi4:PHI4",
        "pythonic": "jaxllm.parsers.tool.pythonic:PYTHONIC",
        "qwen3_coder": "jaxllm.parsers.tool.qwen3_coder:QWEN3_CODER",
        "seed_oss": "jaxllm.parsers.tool.qwen3_coder:SEED_OSS",
    },
)
REASONING_PARSERS: Registry[ReasoningParser] = Registry(
    "reasoning parser",
    {
        "apriel": "jaxllm.parsers.reasoning.between:APRIEL",
        "deepseek_r1": "jaxllm.parsers.reasoning.between:DEEPSEEK_R1",
        "deepseek_v3": "jaxllm.parsers.reasoning.between:DEEPSEEK_V3",
        "glm45": "jaxllm.parsers.reasoning.between:GLM45",
        "granite": "jaxllm.parsers.reasoning.between:GRANITE",
        "granite33": "jaxllm.parsers.reasoning.between:GRANITE33",
        "mistral": "jaxllm.parsers.reasoning.between:MISTRAL",
        "openai_gptoss": "jaxllm.parsers.tool.harmony:OPENAI_GPTOSS",
        "qwen3": "jaxllm.parsers.reasoning.between:THINK",
        "seed_oss": "jaxllm.parsers.reasoning.between:SEED_OSS",
    },
)

type Marks = tuple[tuple[tuple[str, ...], str | None], ...]
# Of a template: texts that are all in it -> the parser, or None for a family whose marks look like
# another's and whose calls nothing here reads. The first line that fits counts.
TOOL_MARKS: Marks = (
    (("<|channel|>", "<|start|>"), "openai"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral_v11"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<seed:tool_call>", "<function="), "seed_oss"),
    (("<tool_call>", "<function=", "<parameter="), "qwen3_coder"),
    (("<arg_key>", "<arg_value>"), "glm45"),
    (("[gMASK]", "<|observation|>"), "glm4"),
    (("<|start_of_role|>", "tool_call"), "granite"),
    (("<tool_calls>[", '"arguments": '), "apriel"),
    (("]<]minimax[>[",), None),
    (("<tool_call>", '"arguments":'), "hermes"),
    (("<tool_call>", '\\"arguments\\":'), "hermes"),
    (("functools",), "phi4_mini_json"),
    (("<|tool_call|>", "<|/tool_call|>"), "phi4_mini_json"),
    (("<|tool|>", "<|/tool|>"), "phi4_mini_json"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<|start_header_id|>", '"parameters": '), "llama3_json"),
    (("<|header_start|>", '"parameters": '), "llama3_json"),
)
REASONING_MARKS: Marks = (
    (("<|channel|>", "<|start|>"), "openai_gptoss"),
    (("[THINK]", "[/THINK]"), "mistral"),
    (("Here is my thought process:",), "granite"),
    (("</think>", "<response></response>"), "granite33"),
    (("[BEGIN FINAL RESPONSE]",), "apriel"),
    (("<seed:think>", "</seed:think>"), "seed_oss"),
    (("</think>", "<｜Assistant｜>"), "deepseek_v3"),
    (("</think>", "[gMASK]"), "glm45"),
    (("</think>",), "qwen3"),
)


@dataclass(frozen=True, slots=True)
class Parsers:
    """Of one model; None: its answers are not looked at for that."""

    tool: ToolParser | None = None
    reasoning: ReasoningParser | None = None

    def answer(self, prompt: str, tools: Mapping[str, Any]) -> AnswerParser | None:
        """For one answer to ``prompt``; None if its text is content and nothing else.

        ``tools``: names that may be called, with the JSON schemas of their arguments; calls are
        read only if there are any.
        """
        tool = self.tool if tools else None
        for both in (self.reasoning, tool):
            reads_all = (
                both.reads_calls
                if isinstance(both, ReasoningParser)
                else both is not None and both.reads_reasoning
            )
            if both is not None and reads_all:
                machine = Machine(both.grammar, tools if self.tool else {})
                return AnswerParser([machine], thinks=True)
        machines: list[Machine] = []
        if self.reasoning is not None:
            begun = self.reasoning.begun_by(prompt)
            machines.append(Machine(self.reasoning.grammar, in_reasoning=begun))
        if tool is not None:
            machines.append(Machine(tool.grammar, tools))
        if not machines:
            return None
        return AnswerParser(machines, thinks=self.reasoning is not None)

    def calling(self) -> "Parsers":
        """For answers that must call a tool: with a form for it, whatever the model knows."""
        if self.tool is not None:
            return self
        reads_calls = self.reasoning is not None and self.reasoning.reads_calls
        return replace(self, tool=TOOL_PARSERS.load("openai" if reads_calls else "hermes"))

    def wants_special_tokens(self, tools: bool) -> bool:
        """Whether markers are special tokens, which the text must then keep."""
        reasons = self.reasoning is not None and self.reasoning.special_tokens
        return reasons or (tools and self.tool is not None and self.tool.special_tokens)


def choose(tool: str, reasoning: str, template: str | None) -> Parsers:
    """By name; ``auto``: by the template; ``none``: no parser.

    Raises:
        ConfigError: no parser has that name, or a package's entry point is none.
    """
    return Parsers(
        _chosen(ToolParser, TOOL_PARSERS, TOOL_MARKS, tool, template),
        _chosen(ReasoningParser, REASONING_PARSERS, REASONING_MARKS, reasoning, template),
    )


def check_names(tool: str, reasoning: str) -> None:
    """Raises ConfigError for a name that ``choose`` would not know."""
    choose(tool, reasoning, None)


def marked(marks: Marks, template: str) -> str | None:
    return next((name for texts, name in marks if all(text in template for text in texts)), None)


def _chosen[T: (ToolParser, ReasoningParser)](
    kind: type[T],
    known: Registry[T],
    marks: Marks,
    name: str,
    template: str | None,
) -> T | None:
    if name == AUTO:
        found = None if template is None else marked(marks, template)
        return None if found is None else known.load(found)
    if name == NONE:
        return None
    if name in known:
        return known.load(name)
    plugins = entry_points(group=GROUPS[kind])
    if name not in plugins.names:
        names = ", ".join(sorted({*known.names(), *plugins.names}))
        raise ConfigError(f"There is no {known.kind} {name!r}; there are {names}, auto and none.")
    loaded = plugins[name].load()
    if not isinstance(loaded, kind):
        raise ConfigError(f"The {known.kind} {name!r} of a package is no {kind.__name__}.")
    return loaded
