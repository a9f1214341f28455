"""LLM: text generation in this process, for scripts and notebooks.

The engine is imported by name when an LLM is made, so that importing this module starts no JAX.
"""

import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, Self, cast

from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import EnginePlan
from jaxllm.errors import InvalidRequestError, RequestFailedError
from jaxllm.frontend.beam_search import BeamSearch, answer_text, next_logprobs, step_params
from jaxllm.frontend.client import ChatMessage, Prompt
from jaxllm.frontend.input_processor import InputProcessor
from jaxllm.frontend.output_processor import OutputProcessor
from jaxllm.frontend.parallel_sampling import fan_out
from jaxllm.frontend.request_state import RequestState
from jaxllm.messages import EngineCoreRequest, EngineStats, StepOutputs
from jaxllm.outputs import BeamSearchOutput, RequestOutput
from jaxllm.sampling_params import BeamSearchParams, SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer

Prompts = Prompt | Sequence[Prompt]


class LLM:
    """Generates for whole lists of prompts at once. Not for use from several threads.

    ::

        llm = LLM("smollm2-135m")
        for output in llm.generate(["Hello", "Once upon"], SamplingParams(max_tokens=20)):
            print(output.outputs[0].text)

    Raises:
        ConfigError: the engine cannot start with these settings (and its subclasses).
    """

    def __init__(self, model: str = "smollm2-135m", **settings: Any):
        self.config = EngineConfig(model=model, **settings)
        wiring = import_module("jaxllm.worker.wiring")
        engine = wiring.build_engine(self.config)
        self._core: Any = engine.core  # None after shutdown
        self.info = engine.info
        self.plan: EnginePlan = engine.plan
        self.summary: dict[str, str | int | float] = engine.summary  # of the start, for logs
        self._tokenizer = Tokenizer.from_dir(self.info.tokenizer_dir)
        self._inputs = InputProcessor(
            self.info,
            self._tokenizer,
            random.Random(self.config.seed),
            takes_priority=self.config.scheduling_policy == "priority",
        )
        self._outputs = OutputProcessor()
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Complete one or more prompts, each a text or a list of token ids; results in their order.

        Without ``sampling_params`` they are ``get_default_sampling_params()``. A request that fails
        alone has ``error`` set and finish_reason "error".

        Raises:
            InvalidRequestError: a prompt or parameter is wrong; nothing has been generated then.
        """
        items = _as_prompts(prompts)
        params = _one_each(
            sampling_params or self.get_default_sampling_params(), len(items), "sampling_params"
        )
        priorities = _one_each(priority or 0, len(items), "priority")
        states: list[RequestState] = []
        children: list[EngineCoreRequest] = []
        grammars = [self._inputs.check_grammar(item) for item in params]
        for prompt, item_params, item_priority, grammar in zip(
            items, params, priorities, grammars, strict=True
        ):
            request = self._inputs.process(
                str(self._num_requests),
                self._inputs.encode(prompt, add_special_tokens),
                item_params,
                grammar=grammar.result(),
                priority=item_priority,
                arrival_time=time.time(),
            )
            self._num_requests += 1
            mine = fan_out(request, item_params.n)
            text = prompt if isinstance(prompt, str) else None
            states.append(
                RequestState(request.request_id, text, mine, item_params, self._tokenizer)
            )
            children.extend(mine)
        return self._run(states, children, use_tqdm)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, by the model's chat template.

        Raises:
            InvalidRequestError: no template, or it refuses a conversation.
        """
        one = not messages or isinstance(messages[0], dict)
        conversations = cast(Sequence[Sequence[ChatMessage]], [messages] if one else messages)
        prompts = [
            self._tokenizer.apply_chat_template(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm, add_special_tokens=False)

    def beam_search(self, prompts: Prompts, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The answers to each prompt that are the most likely as a whole, best first.

        Raises:
            InvalidRequestError: a prompt or parameter is wrong; nothing has been computed then.
            RequestFailedError: the engine failed on one of them.
        """
        inputs = [self._inputs.encode(prompt) for prompt in _as_prompts(prompts)]
        searches = [BeamSearch(token_ids, params, self.info) for token_ids in inputs]
        step = step_params(params)
        while going := [search for search in searches if search.prompts]:
            asked = [token_ids for search in going for token_ids in search.prompts]
            outputs = iter(self.generate(asked, step, use_tqdm=False))
            for search in going:
                search.advance([next_logprobs(next(outputs)) for _ in search.prompts])
        for token_ids, search in zip(inputs, searches, strict=True):
            for sequence in search.sequences:
                sequence.text = self._tokenizer.decode(token_ids) + answer_text(
                    self._tokenizer,
                    sequence,
                    len(token_ids),
                    include_stop=params.include_stop_str_in_output,
                )
        return [BeamSearchOutput(search.sequences) for search in searches]

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's makers recommend, unless ``generation_config="none"``."""
        defaults: dict[str, Any] = dict(self.info.sampling_defaults)
        if self.info.max_new_tokens is not None:
            defaults["max_tokens"] = None  # so many, or what fits
        return SamplingParams(**defaults)

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def core(self) -> Any:
        """The EngineCore, for benchmarks."""
        return self._core

    def stats(self) -> EngineStats:
        return self._core.stats()

    def shutdown(self) -> None:
        """Let go of the engine and the memory of its device. Nothing else works afterwards."""
        if self._core is not None:
            self._core.close()
        self._core = None
        self._inputs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _run(
        self, states: list[RequestState], children: list[EngineCoreRequest], use_tqdm: bool
    ) -> list[RequestOutput]:
        if self._core is None:
            raise InvalidRequestError("This LLM has been shut down; make a new one.")
        try:
            for state in states:
                self._outputs.add(state)
            for child in children:
                self._core.add_request(child)
            with _Progress(len(states), use_tqdm) as progress:
                self._step_until_done(states, progress)
        finally:  # on Ctrl-C too: the next call must find an empty engine
            unfinished = [child for state in states for child in state.unfinished_ids()]
            if unfinished:
                self._core.abort(unfinished)
            for state in states:
                self._outputs.remove(state)
        return [state.take_all() for state in states]

    def _step_until_done(self, states: list[RequestState], progress: "_Progress") -> None:
        """What a step tells is turned into text while the device computes the next but one."""
        waiting, told = list(states), None
        while waiting:
            if told is None and not self._core.has_work():
                raise RequestFailedError("The engine forgot about a request.")
            to_text = cache(partial(self._to_text, told))
            step = self._core.step(to_text)
            if aborts := to_text():  # done by now, unless the step has failed
                self._core.abort(aborts)
            if told is not None:
                if told.events or aborts:  # only they end a request
                    waiting = [state for state in waiting if not state.finished]
                num_tokens = len(told.token_ids) + sum(len(e.new_token_ids) for e in told.events)
                progress.update(len(states) - len(waiting), num_tokens)
            told = step

    def _to_text(self, told: StepOutputs | None) -> tuple[str, ...]:
        return () if told is None else self._outputs.process(told)


def _as_prompts(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _one_each[T](value: T | Sequence[T], count: int, param: str) -> list[T]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(
            f"{param} has {len(value)} entries for {count} prompts.", param=param
        )
    return list(value)


class _Progress:
    """A bar of finished requests, with the rate of generated tokens. Silent when not wanted."""

    def __init__(self, total: int, wanted: bool, clock: Callable[[], float] = time.monotonic):
        self._bar: Any = None
        self._clock = clock
        self._started = clock()
        self._tokens = 0
        if wanted:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc="Processed prompts", unit="req")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, num_done: int, num_new_tokens: int) -> None:
        self._tokens += num_new_tokens
        if self._bar is not None:
            seconds = max(self._clock() - self._started, 1e-9)
            self._bar.set_postfix_str(f"output {self._tokens / seconds:.1f} tok/s", refresh=False)
            self._bar.update(num_done - self._bar.n)
