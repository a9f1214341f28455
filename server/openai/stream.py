"""The chunks of streamed answers, in OpenAI's order. Knows no HTTP; the framing is sse.py's."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from jaxllm.errors import InvalidRequestError, JaxLLMError
from jaxllm.outputs import CompletionOutput, RequestOutput
from server.openai.reply import Reply, finish_reason
from server.openai.schemas import StreamOptions

Outputs = AsyncGenerator[tuple[int, RequestOutput]]
Choice = dict[str, Any]


async def about(outputs: Outputs, **names: str) -> Outputs:
    """With errors that name fields as clients of the endpoint do: ``prompt="messages"``."""
    try:
        async with aclosing(outputs):
            async for output in outputs:
                yield output
    except InvalidRequestError as error:
        error.param = names.get(error.param or "", error.param)
        raise


async def stream_chunks(
    outputs: Outputs,
    reply: Reply,
    *,
    num_choices: int,
    options: StreamOptions | None,
    opening: Callable[[int, RequestOutput], list[Choice]],
    deltas: Callable[[int, CompletionOutput], list[Choice]],
    ending: Callable[[int, CompletionOutput, str], Choice],
) -> AsyncGenerator[list[dict[str, Any]]]:
    """Opening, deltas and one end per choice; then, if asked for, the usage. Chunks that are there
    together come in one list.

    ``opening`` is given each prompt's first output. ``num_choices`` is ``n``: choice ``c`` of
    prompt ``p`` has index ``p * n + c``, the number that the callables get.

    Raises:
        JaxLLMError: also when a choice never ended, so that no stream ends as if it were whole.
    """
    asks_usage = options is not None and bool(options.include_usage)
    in_every_chunk = options is not None and bool(options.continuous_usage_stats)
    open_choices: set[int] = set()
    seen_prompts: set[int] = set()
    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            reply.usage.add(prompt_index, output)
            base = prompt_index * num_choices
            choices: list[Choice] = []
            if prompt_index not in seen_prompts:
                seen_prompts.add(prompt_index)
                open_choices.update(range(base, base + num_choices))
                choices += opening(base, output)
            for completion in output.outputs:
                index = base + completion.index
                if index not in open_choices:
                    continue
                choices += deltas(index, completion)
                reason = finish_reason(completion)
                if reason is not None:
                    open_choices.discard(index)
                    choices.append(ending(index, completion, reason))
            if choices:
                usage: dict[str, Any] = {}
                if asks_usage:
                    usage = {"usage": reply.usage.as_object() if in_every_chunk else None}
                yield [reply.with_choices([choice], **usage) for choice in choices]
    if open_choices or not seen_prompts:
        raise JaxLLMError("The engine's output ended before the request did.")
    if asks_usage:
        yield [reply.with_choices([], usage=reply.usage.as_object())]
