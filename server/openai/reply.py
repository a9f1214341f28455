"""What all objects of one answer share: its id, its time, its model, its usage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from jaxllm.errors import RequestFailedError
from jaxllm.outputs import CompletionOutput, RequestOutput
from server.thought_tokens import ThoughtTokens


@dataclass(slots=True)
class Usage:
    """Token counts, summed over outputs as they come. ``thoughts``: None where none are read."""

    thoughts: ThoughtTokens | None = None
    prompt_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """``output`` brings only new tokens, or is the only one of its request."""
        self.prompt_tokens[prompt_index] = len(output.prompt_token_ids)
        self.cached_tokens[prompt_index] = output.num_cached_tokens
        self.completion_tokens += sum(len(choice.token_ids) for choice in output.outputs)
        if self.thoughts is not None:
            self.thoughts.add(output)

    def as_object(self) -> dict[str, Any]:
        prompt_tokens = sum(self.prompt_tokens.values())
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }
        if self.thoughts is None:
            return usage
        details = {"reasoning_tokens": self.thoughts.count()}
        return usage | {"completion_tokens_details": details}


class Reply:
    """``id`` is made here and also names the request in the engine."""

    def __init__(
        self, prefix: str, object_name: str, model: str, thoughts: ThoughtTokens | None = None
    ):
        self.id = f"{prefix}-{uuid4().hex}"
        self.usage = Usage(thoughts)
        self._head = {
            "id": self.id,
            "object": object_name,
            "created": int(time.time()),
            "model": model,
        }

    def with_choices(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {**self._head, "choices": choices, **more}


def finish_reason(choice: CompletionOutput) -> str | None:
    """In OpenAI's words; there is none for a request that was ended by force.

    Raises:
        RequestFailedError: the engine ended it for another reason than its parameters.
    """
    if choice.finish_reason in (None, "stop", "length"):
        return choice.finish_reason
    raise RequestFailedError(f"The request did not run to its end ({choice.finish_reason}).")


def best(completions: Sequence[CompletionOutput], count: int) -> Sequence[CompletionOutput]:
    """The ``count`` whose tokens were the most likely on average, numbered anew."""
    if len(completions) <= count:
        return completions

    def score(completion: CompletionOutput) -> float:
        return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))

    ranked = sorted(completions, key=score, reverse=True)
    return [replace(completion, index=i) for i, completion in enumerate(ranked[:count])]
