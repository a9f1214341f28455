"""The chunks of streamed answers, in OpenAI's order. Knows no HTTP; the framing is sse.py's."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from jaxllm.errors import JaxLLMError
from jaxllm.outputs import CompletionOutput, RequestOutput
from server.openai.reply import Reply, finish_reason

Outputs = AsyncGenerator[tuple[int, RequestOutput]]
Choice = dict[str, Any]


async def stream_chunks(
    outputs: Outputs,
    reply: Reply,
    *,
    num_choices: int,
    include_usage: bool,
    opening: Callable[[int, RequestOutput], list[Choice]],
    delta: Callable[[int, CompletionOutput], Choice | None],
    ending: Callable[[int, CompletionOutput, str], Choice],
) -> AsyncGenerator[dict[str, Any]]:
    """Opening, deltas and one end per choice; then, if asked for, the usage.

    ``opening`` is given each prompt's first output. ``num_choices`` is ``n``: choice ``c`` of
    prompt ``p`` has index ``p * n + c``, the number that the callables get.

    Raises:
        JaxLLMError: also when a choice never ended, so that no stream ends as if it were whole.
    """
    usage = {"usage": None} if include_usage else {}
    open_choices: set[int] = set()
    seen_prompts: set[int] = set()
    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            reply.usage.add(prompt_index, output)
            base = prompt_index * num_choices
            if prompt_index not in seen_prompts:
                seen_prompts.add(prompt_index)
                open_choices.update(range(base, base + num_choices))
                for choice in opening(base, output):
                    yield reply.with_choices([choice], **usage)
            for completion in output.outputs:
                index = base + completion.index
                if index not in open_choices:
                    continue
                choice = delta(index, completion)
                if choice is not None:
                    yield reply.with_choices([choice], **usage)
                reason = finish_reason(completion)
                if reason is not None:
                    open_choices.discard(index)
                    yield reply.with_choices([ending(index, completion, reason)], **usage)
    if open_choices or not seen_prompts:
        raise JaxLLMError("The engine's output ended before the request did.")
    if include_usage:
        yield reply.with_choices([], usage=reply.usage.as_object())
