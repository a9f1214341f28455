"""The fields of requests for text: the one definition of their names, types and ranges.

Names are OpenAI's, or vLLM's where OpenAI has none. Null means "not given" everywhere. Numbers are
strict: no booleans, no strings, no NaN. Unknown fields are kept in ``model_extra``.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.config.limits import MAX_N
from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.sampling_params import (
    MAX_STOP_TOKEN_IDS,
    MIN_REPETITION_PENALTY,
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
)
from server.openai import beam_search, refused
from server.openai.conversation import ONE_END, Messages, TemplateOptions
from server.openai.fields import (
    INT32,
    INT64,
    MANY,
    MAX_SEQUENCES,
    ONE,
    BadWords,
    Count,
    LengthPenalty,
    LogitBias,
    LogprobCount,
    ModelRequest,
    Penalty,
    PromptField,
    RequestObject,
    Salt,
    StopField,
    TokenId,
    TokenIds,
    absent,
    both,
    conflict,
    either,
    given,
    number_or_list,
    off,
    prompts_of,
)
from server.openai.structured import (
    GUIDED,
    Choices,
    NotEmpty,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    guided_params,
    only_one,
)
from server.openai.taps import Interventions, TapNames, TapPositionsField, check_alone, made

# What the engine's attention variant declares: a number, or a list of them.
AttentionParam = Annotated[
    Annotated[float, ONE] | Annotated[list[float], Field(fail_fast=True, max_length=2**17), MANY],
    number_or_list(),
]


class StreamOptions(RequestObject):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[bool, Field(json_schema_extra={"const": False})] | None = None

    @field_validator("include_obfuscation")
    @classmethod
    def _never(cls, value: bool | None) -> bool | None:
        if value:
            raise PydanticCustomError("unsupported_value", "this server adds no padding to events")
        return value


_NOT_STREAMED = off("stream")


class SamplingRequest(ModelRequest):
    """What all endpoints that generate text take."""

    model_config = ConfigDict(json_schema_extra=either(absent("taps"), _NOT_STREAMED))

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=MIN_REPETITION_PENALTY, le=100)] | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[TokenIds, Field(json_schema_extra={"minItems": 1})] | None = None
    bad_words: BadWords | None = None
    stop: StopField | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: NotEmpty | None = None
    guided_choice: Choices | None = None
    guided_grammar: NotEmpty | None = None
    guided_whitespace_pattern: str | None = None
    cache_salt: Salt | None = None
    parallel_tool_calls: bool | None = None  # false: no call but the first is told
    attention_params: Annotated[dict[str, AttentionParam], Field(max_length=64)] | None = None
    taps: TapNames | None = None
    tap_positions: TapPositionsField | None = None
    interventions: Interventions | None = None

    # Known, and without effect here: notes of the client's, and hints about caches and speed.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    guided_decoding_backend: str | None = None
    length_penalty: LengthPenalty | None = None  # except in a beam search
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    session_id: str | None = None
    spaces_between_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _taps_come_whole(self) -> Self:
        check_alone(self.taps, self.stream, 1)
        return self

    def _sampling_params(self, defaults: Mapping[str, float], **overrides: Any) -> SamplingParams:
        """``defaults``: of the model, for what the request leaves open."""
        given = {name: getattr(self, name) for name in _SHARED}
        given["output_kind"] = (
            RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        )
        given["interventions"] = made(self.interventions)
        given["structured_outputs"] = only_one(self._structured_outputs())
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**{**defaults, **chosen, **overrides})

    def _structured_outputs(self) -> list[StructuredOutputsParams]:
        """All that was asked for. Raises InvalidRequestError."""
        guided = {name: getattr(self, name) for name in GUIDED}
        found = guided_params(guided, self.guided_whitespace_pattern)
        if self.structured_outputs is not None:
            found.append(self.structured_outputs.params())
        return found


_SHARED = SamplingRequest.model_fields.keys() & {field.name for field in fields(SamplingParams)}
_ALONE = {"properties": {"stream": {"enum": [False, None]}, "n": {"enum": [1, None]}}}


_AGREEMENT = (
    either(absent("stream_options"), given("stream", const=True)),
    either(absent("prompt_logprobs"), _NOT_STREAMED),
    either(absent("taps"), _ALONE),
    beam_search.SCHEMA,
)


class GenerationRequest(SamplingRequest):
    """What completions and chat completions take beyond that."""

    model_config = ConfigDict(json_schema_extra=both(*_AGREEMENT))

    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    use_beam_search: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None  # beams, or drawn; default: n
    prompt_logprobs: LogprobCount | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "it is only allowed when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise conflict("prompt_logprobs", "it is not available when stream is true")
        if self.num_sequences < self.num_choices:
            raise conflict("best_of", "it must not be less than n")
        if self.stream and self.num_sequences > self.num_choices:
            raise conflict("best_of", "the best are known at the end, so stream must be false")
        if self.use_beam_search:
            beam_search.check(self.num_sequences, self.__dict__)
        check_alone(self.taps, None, self.num_sequences)
        return self

    def _structured_outputs(self) -> list[StructuredOutputsParams]:
        found = super()._structured_outputs()
        if self.response_format is not None:
            params = self.response_format.params("response_format")
            found += [] if params is None else [params]
        return found

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def num_sequences(self) -> int:
        """That run at once for each prompt, of which the best are told."""
        return self.num_choices if self.best_of is None else self.best_of

    def beam_search_params(self, params: SamplingParams) -> BeamSearchParams | None:
        """None: answers are drawn, as ``params`` say."""
        if not self.use_beam_search:
            return None
        return BeamSearchParams(
            beam_width=self.num_sequences,
            max_tokens=params.max_tokens,
            ignore_eos=params.ignore_eos,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )

    def _choice_params(
        self, defaults: Mapping[str, float], *, logprobs: int | None, **overrides: Any
    ) -> SamplingParams:
        own: dict[str, Any] = {"n": self.num_choices, "prompt_logprobs": self.prompt_logprobs}
        if not self.use_beam_search and self.num_sequences > self.num_choices:
            own["n"] = self.num_sequences
            logprobs = logprobs or 0  # they tell which are the best
        return self._sampling_params(defaults, **own | overrides, logprobs=logprobs)


class CompletionRequest(GenerationRequest):
    REFUSED: ClassVar[dict[str, str]] = refused.COMPLETION

    prompt: PromptField
    logprobs: LogprobCount | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if len(self.prompts) * self.num_sequences > MAX_SEQUENCES:
            raise conflict("n", f"prompts times n must not be more than {MAX_SEQUENCES}")
        check_alone(self.taps, None, len(self.prompts))
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return prompts_of(self.prompt)

    def sampling_params(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Raises InvalidRequestError for values that do not go together."""
        overrides: dict[str, Any] = {}
        if self.max_tokens is not None:
            overrides["max_tokens"] = self.max_tokens
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            overrides["prompt_logprobs"] = self.logprobs
        return self._choice_params(defaults, logprobs=self.logprobs, **overrides)


class ChatCompletionRequest(GenerationRequest, TemplateOptions):
    REFUSED: ClassVar[dict[str, str]] = refused.CHAT
    model_config = ConfigDict(json_schema_extra=both(*_AGREEMENT, ONE_END))

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_special_tokens: bool | None = None
    modalities: list[Literal["text"]] | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Count | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "it needs logprobs to be true")
        return self

    def sampling_params(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Raises InvalidRequestError for values that do not go together."""
        limit = self.max_completion_tokens
        return self._choice_params(
            defaults,
            max_tokens=self.max_tokens if limit is None else limit,
            thinking_token_budget=self.thinking_token_budget,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
