"""An EngineClient without an engine: every request is answered with the same text, byte by byte."""

import asyncio
import random
import struct
from collections.abc import AsyncGenerator, Sequence

from jaxllm.frontend.client import Prompt
from jaxllm.frontend.input_processor import InputProcessor
from jaxllm.frontend.metrics import EngineMetrics, merged
from jaxllm.frontend.parallel_sampling import fan_out
from jaxllm.frontend.request_state import RequestState
from jaxllm.messages import (
    Admission,
    EngineCoreOutput,
    EngineCoreRequest,
    EngineStats,
    ModelInfo,
    StepOutputs,
    TapValue,
    TokenLogprobs,
)
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.taps.positions import tapped_between
from jaxllm.taps.sites import parse_site
from jaxllm.tokenizer.tokenizer import Tokenizer

ANSWER = "Hello, wörld!"
EOS_ID = 257
TOKEN_SECONDS = 0.25
OTHER_ID = 65  # the second most likely token, always


class FakeClient:
    """The text side is the real one; only the tokens are made up.

    ``step_seconds`` is slept before every token; ``fail_with`` is raised instead of token
    ``fail_at``. Every logprob is -0.5, that of ``OTHER_ID`` -1.5.
    """

    def __init__(self, tokenizer: Tokenizer, info: ModelInfo, answer: str = ANSWER):
        self.info = info
        self.tokenizer = tokenizer
        self.unready_because: str | None = None
        self.step_seconds = 0.0
        self.fail_with: Exception | None = None
        self.fail_at = 0
        self.finish_reason: str | None = None  # overrides "stop"
        self.prompts: list[Prompt] = []
        self.params: list[SamplingParams] = []
        self.request_ids: list[str] = []
        self.priorities: list[int] = []
        self.tenants: list[str] = []
        self.cache_salts: list[str] = []
        self.add_special_tokens: list[bool] = []
        self.num_running = 0
        self.aborted: list[str] = []
        self._answer_ids = tokenizer.encode(answer, add_special_tokens=False)
        self.engine_stats: EngineStats | None = None
        self.now = 0.0  # of the engine's clock and ours; each token takes a quarter second
        self.metrics = EngineMetrics(info.max_model_len, clock=lambda: self.now)
        self._inputs = InputProcessor(info, tokenizer, random.Random(0))

    @property
    def ready(self) -> bool:
        return self.unready_because is None

    def stats(self) -> EngineStats | None:
        return self.engine_stats

    async def abort(self, request_id: str) -> None:
        raise NotImplementedError("the server closes generators instead")

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
        assert request_id is not None
        self.prompts.append(prompt)
        self.params.append(sampling_params)
        self.request_ids.append(request_id)
        self.priorities.append(priority)
        self.tenants.append(tenant)
        self.cache_salts.append(cache_salt)
        self.add_special_tokens.append(add_special_tokens)
        token_ids = self._inputs.encode(prompt, add_special_tokens)
        grammar = ""
        if sampling_params.structured_outputs is not None:
            grammar = await asyncio.wrap_future(self._inputs.check_grammar(sampling_params))
        request = self._inputs.process(request_id, token_ids, sampling_params, grammar=grammar)
        children = fan_out(request, sampling_params.n)
        text = prompt if isinstance(prompt, str) else None
        state = RequestState(request_id, text, children, sampling_params, self.tokenizer)
        records = self.metrics.add(children, self.now)
        self.num_running += 1
        try:
            for step in range(self.info.max_model_len):
                await asyncio.sleep(self.step_seconds)
                if self.fail_with is not None and step == self.fail_at:
                    raise self.fail_with
                running = [i for i in range(len(children)) if state.is_running(i)]
                tokens = {i: self._token(children[i], step) for i in running}
                self._tell(children if step == 0 else (), list(tokens.values()))
                for index, token in tokens.items():
                    state.add_output(index, token)
                output = state.take()
                if output is not None:
                    output.metrics = merged(records)
                    yield output
                if state.finished:
                    return
        finally:
            self.num_running -= 1
            self.metrics.end(children, state.finish_reasons)
            if not state.finished:
                self.aborted.append(request_id)

    def _tell(self, admitted: Sequence[EngineCoreRequest], events: list[EngineCoreOutput]) -> None:
        """A step of the engine: admitted an eighth second after they came, done an eighth later."""
        came, self.now = self.now, self.now + TOKEN_SECONDS
        admissions = [Admission(r.request_id, came, came + TOKEN_SECONDS / 2) for r in admitted]
        step = StepOutputs(0, events=events, timestamp=self.now, admitted=admissions)
        self.metrics.step(step)

    def _token(self, child: EngineCoreRequest, step: int) -> EngineCoreOutput:
        answer = self._answer_ids
        ended = step >= len(answer) and not child.sampling_params.ignore_eos
        token_id = EOS_ID if ended else answer[step % len(answer)]
        reason = "stop" if ended else "length" if step + 1 >= child.max_tokens else None
        if reason is not None and self.finish_reason is not None:
            reason = self.finish_reason
        wants_prompt = step == 0 and child.sampling_params.prompt_logprobs is not None
        ids = (token_id,) if child.max_tokens > 0 else ()
        return EngineCoreOutput(
            child.request_id,
            ids,
            reason,
            logprobs=tuple(map(_scored, ids)),
            prompt_logprobs=tuple(map(_scored, child.prompt_token_ids[1:])) if wants_prompt else (),
            embedding=self._embedding(child) if child.sampling_params.embed else None,
            taps=self._taps(child) if step == 0 and child.sampling_params.taps else (),
        )

    def _taps(self, child: EngineCoreRequest) -> tuple[TapValue, ...]:
        """Of the prompt; every number is the position."""
        params, length, shapes = child.sampling_params, len(child.prompt_token_ids), self.info.taps
        assert shapes is not None
        return tuple(
            TapValue(name, at, struct.pack("<f", at) * int(parse_site(name).num_values(at, shapes)))
            for at in tapped_between(params.tap_positions, length, 0, length)
            for name in params.taps or ()
        )

    def _embedding(self, child: EngineCoreRequest) -> bytes:
        """Tells prompts apart: 1, then the last token, then zeros."""
        numbers = [1.0, float(child.prompt_token_ids[-1])]
        size = self.info.embedding_size
        return struct.pack(f"<{size}f", *numbers, *[0.0] * (size - 2))


def _scored(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, (token_id, OTHER_ID), (-0.5, -1.5))
