"""What every route works with: the engine, the settings, the gates. It is ``app.state.serving``."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import cast

from starlette.requests import Request

from jaxllm.errors import ModelNotFoundError, RequestFailedError
from jaxllm.frontend.async_beam_search import beam_search
from jaxllm.frontend.client import EngineClient, Prompt
from jaxllm.outputs import RequestOutput
from jaxllm.parsers.choice import AUTO, NONE, Parsers, choose
from jaxllm.sampling_params import BeamSearchParams, SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.disconnect import cancel
from server.drain import Drain
from server.limits import AdmissionGate, check_scored, num_prompt_tokens
from server.protocol.refusals import RefusalLog
from server.record import RequestRecord
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

_MAX_REMEMBERED_FIELDS = 256


class Serving:
    def __init__(self, client: EngineClient, settings: ServerSettings):
        self.client = client
        self.settings = settings
        self.gate = AdmissionGate(
            settings.max_num_seqs + settings.max_num_queued_reqs,
            settings.kv_cache_tokens + settings.max_num_queued_tokens,
            fair=settings.fair,
        )
        self.drain = Drain()
        self.refusals = RefusalLog()
        self.started = int(time.time())
        self.parsers = _parsers(client.tokenizer, settings)
        self._ignored_fields: set[str] = set()

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """Fields of SamplingParams where a request leaves them open, as the model recommends."""
        return self.client.info.sampling_defaults

    def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError for a name that is not served."""
        if name not in self.settings.served_model_names:
            raise ModelNotFoundError(
                f"The model {name[:64]!r} does not exist; this server has "
                f"{', '.join(self.settings.served_model_names)}.",
                param="model",
            )

    def note_ignored(self, fields: Iterable[str]) -> None:
        """Log each field that was not understood, once."""
        for name in fields:
            known = self._ignored_fields
            if name not in known and len(known) < _MAX_REMEMBERED_FIELDS:
                known.add(name)
                logger.warning("Ignoring the unknown request field %.64r", name)

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        request_id: str,
        record: RequestRecord,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        beams: BeamSearchParams | None = None,
    ) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Outputs of all prompts as they come, each with its prompt's index. Closing it aborts all.
        ``record`` is kept up to date. With ``beams`` the answers are the most likely ones, and come
        at the end.

        Raises:
            JaxLLMError: whatever ends one prompt ends them all.
        """
        record.params = params
        num_tokens = num_prompt_tokens(prompts)
        check_scored(num_tokens, params)
        num_sequences = params.n if beams is None else beams.beam_width
        place = self.gate.admit(len(prompts) * num_sequences, num_tokens, record.tenant)
        generate = self.client.generate
        if beams is not None:
            generate = partial(beam_search, self.client, beams)
        with record.generating(), place:
            sources = [
                generate(
                    prompt,
                    params,
                    request_id=f"{request_id}-{index}",
                    priority=priority,
                    tenant=record.tenant,
                    cache_salt=cache_salt,
                    add_special_tokens=add_special_tokens,
                )
                for index, prompt in enumerate(prompts)
            ]
            generators = cast(list[AsyncGenerator[RequestOutput]], sources)
            async with aclosing(_merge(generators)) as merged:
                async for index, output in merged:
                    record.add(index, output)
                    if output.error is not None:
                        raise RequestFailedError(output.error)
                    yield index, output


def _parsers(tokenizer: Tokenizer, settings: ServerSettings) -> Parsers:
    """Of the served model's answers; the chat template may tell them."""
    template = tokenizer.chat_template
    tool = settings.tool_call_parser if settings.enable_auto_tool_choice else NONE
    text = None if template is None else template.text
    parsers = choose(tool, settings.reasoning_parser, text)
    if tool == AUTO and template is not None and "tools" in template.variables:
        reads = parsers.tool or (parsers.reasoning and parsers.reasoning.reads_calls)
        if not reads:
            logger.warning(
                "The chat template tells the model of tools, but not in a form that is known here: "
                "calls will stay text, unless --tool-call-parser says how they are written"
            )
    return parsers


# So many that short work need not wait for long work to end: how much text there is at once is
# bounded elsewhere. A thread is begun when there is work for it.
_ASIDE = ThreadPoolExecutor(64, thread_name_prefix="aside")


def serving_of(request: Request) -> Serving:
    return request.app.state.serving


async def aside[**P, T](long: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``work`` returns; ``long`` work is done beside the event loop."""
    if not long:
        return work(*args, **kwargs)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_ASIDE, partial(work, *args, **kwargs))


async def _merge(
    sources: Sequence[AsyncGenerator[RequestOutput]],
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for output in source:
                yield 0, output
        return
    # One place per source: what a slow reader does not take yet waits in the engine's client.
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(len(sources))

    async def pump(index: int, source: AsyncGenerator[RequestOutput]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(source):
                async for output in source:
                    await queue.put((index, output))
        except Exception as error:
            end = error
        await queue.put((index, end))

    pumps = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    try:
        num_open = len(pumps)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        await cancel(*pumps)
