"""AsyncLLM: text generation on an engine process of its own. Never imports JAX.

Owns the lives of requests between the caller's iterator and the engine process.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Self
from uuid import uuid4

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError
from jaxllm.frontend.client import Prompt
from jaxllm.frontend.input_processor import InputProcessor
from jaxllm.frontend.metrics import EngineMetrics, merged
from jaxllm.frontend.output_processor import OutputProcessor
from jaxllm.frontend.parallel_sampling import fan_out
from jaxllm.frontend.poison_guard import PoisonGuard
from jaxllm.frontend.process_client import EngineProcess
from jaxllm.frontend.request_state import RequestState
from jaxllm.ipc import FrameError
from jaxllm.messages import AbortRequests, EngineStats, ModelInfo, StepOutputs
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer

_LONG_PROMPT_CHARS = 20_000  # beyond it, encoding would hold up the event loop for milliseconds


class AsyncLLM:
    """Implements ``jaxllm.frontend.client.EngineClient``.

    ::

        async with AsyncLLM(model="smollm2-135m") as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=20)):
                print(output.outputs[0].text)
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        worker_module: str = "jaxllm.worker",
        **settings: Any,
    ):
        if config is not None and settings:
            raise TypeError("Give a config or single settings, not both.")
        self.config = config if config is not None else EngineConfig(**settings)
        self._outputs = OutputProcessor()
        self._guard = PoisonGuard()
        self._engine = EngineProcess(
            self.config,
            on_outputs=self._on_outputs,
            on_death=self._on_death,
            worker_module=worker_module,
        )
        self._tokenizer: Tokenizer | None = None
        self._inputs: InputProcessor | None = None
        self._metrics: EngineMetrics | None = None

    async def start(self) -> Self:
        """Start the engine process and wait until it is ready.

        Raises:
            ConfigError: the engine cannot start with this configuration (and its subclasses).
            EngineDeadError: the engine died while starting.
        """
        info = await self._engine.start()
        try:
            self._tokenizer = await asyncio.to_thread(Tokenizer.from_dir, info.tokenizer_dir)
        except BaseException:
            await self._engine.stop()
            raise
        self._inputs = InputProcessor(
            info,
            self._tokenizer,
            random.Random(self.config.seed),
            takes_priority=self.config.scheduling_policy == "priority",
        )
        self._metrics = EngineMetrics(info.max_model_len)
        return self

    async def shutdown(self, *, at_once: bool = False) -> None:
        """End the engine; requests that still run get EngineDeadError. May be called twice.
        ``at_once`` kills it instead of waiting for the step it is in.
        """
        self._outputs.fail_all(EngineDeadError("The engine is shutting down."))
        if self._inputs is not None:
            self._inputs.close()
        await self._engine.stop(at_once=at_once)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.shutdown()

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineDeadError("The engine has not been started.")
        return self._tokenizer

    @property
    def metrics(self) -> EngineMetrics:
        """Of all requests so far, whatever engine they met."""
        if self._metrics is None:
            raise EngineDeadError("The engine has not been started.")
        return self._metrics

    @property
    def ready(self) -> bool:
        return self._engine.ready and self._inputs is not None

    @property
    def unready_because(self) -> str | None:
        """Why requests had better go elsewhere: the engine is down, or late with its next step."""
        return self._engine.unready_because

    @property
    def engine(self) -> EngineProcess:
        """The process behind it, for supervision: pid, generation, gave_up."""
        return self._engine

    def stats(self) -> EngineStats | None:
        """The engine's own figures, about a second old; None while it is down."""
        return self._engine.stats

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[RequestOutput]:
        """See ``EngineClient.generate``. A slow reader gets several steps in one output."""
        arrival_time = time.time()
        if self._inputs is None or not self._engine.ready:
            raise self._engine.death()
        arrived = self.metrics.clock()
        request_id = uuid4().hex if request_id is None else request_id
        token_ids = await self._encode(self._inputs, prompt, add_special_tokens)
        request = self._inputs.process(
            request_id,
            token_ids,
            sampling_params,
            grammar=await self._grammar(self._inputs, sampling_params),
            priority=priority,
            arrival_time=arrival_time,
            tenant=tenant,
            cache_salt=cache_salt,
        )
        self._guard.check((token_ids, sampling_params))
        children = fan_out(request, sampling_params.n)
        news = asyncio.Event()
        state = RequestState(
            request_id,
            prompt if isinstance(prompt, str) else None,
            children,
            sampling_params,
            self.tokenizer,
            notify=news.set,
        )
        self._outputs.add(state)
        records = self.metrics.add(children, arrived)
        try:
            for child in children:
                self._engine.send(child)
            while True:
                await news.wait()
                news.clear()
                output = state.take()
                if state.error is not None:
                    raise state.error
                if output is not None:
                    output.metrics = merged(records)
                    yield output
                    if output.finished:
                        self._guard.finished((token_ids, sampling_params))
                        return
        finally:
            self._outputs.remove(state)
            self._abort_in_engine(state.unfinished_ids())
            self.metrics.end(children, state.finish_reasons, state.num_cached_tokens)

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets a last output with finish_reason "abort"."""
        state = self._outputs.get(request_id)
        if state is not None:
            self._abort_in_engine(state.unfinished_ids())
            state.abort()
            self._outputs.remove(state)

    async def _encode(
        self, inputs: InputProcessor, prompt: Prompt, add_special_tokens: bool
    ) -> tuple[int, ...]:
        if isinstance(prompt, str) and len(prompt) > _LONG_PROMPT_CHARS:
            return await asyncio.to_thread(inputs.encode, prompt, add_special_tokens)
        return inputs.encode(prompt, add_special_tokens)

    async def _grammar(self, inputs: InputProcessor, params: SamplingParams) -> str:
        if params.structured_outputs is None:
            return ""
        return await asyncio.wrap_future(inputs.check_grammar(params))

    def _on_death(self, error: EngineDeadError) -> None:
        running = [(state.prompt_token_ids, state.params) for state in self._outputs.running()]
        self._outputs.fail_all(error)
        self._guard.died(running)
        if self._metrics is not None:
            self._metrics.num_engine_deaths += 1

    def _on_outputs(self, step: StepOutputs) -> None:
        if self._metrics is not None:
            self._metrics.step(step)
        self._abort_in_engine(self._outputs.process(step))

    def _abort_in_engine(self, request_ids: Sequence[str]) -> None:
        if request_ids and self._engine.ready:
            try:
                self._engine.send(AbortRequests(tuple(request_ids)))
            except (EngineDeadError, FrameError):
                return  # a dead engine has nothing left to abort
