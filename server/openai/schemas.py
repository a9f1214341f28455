"""The fields of requests: the one definition of their names, types and ranges.

Names are OpenAI's, or vLLM's where OpenAI has none. Null means "not given" everywhere. Numbers are
strict: no booleans, no strings, no NaN. Unknown fields are kept in ``model_extra``.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_TOKEN_IDS,
    RequestOutputKind,
    SamplingParams,
)
from server.openai.fields import (
    INT32,
    INT64,
    MAX_MESSAGES,
    MAX_PROMPTS,
    Content,
    Count,
    LogprobCount,
    Objects,
    Penalty,
    PromptField,
    RequestObject,
    StringOrStrings,
    Strings,
    TokenIds,
)


class StreamOptions(RequestObject):
    include_usage: bool | None = None


class GenerationRequest(RequestObject):
    """What both endpoints take."""

    # Fields that would change the answer if they were ignored, so they are refused.
    REFUSED: ClassVar[dict[str, str]] = {
        "best_of": "use n",
        "use_beam_search": "beam search is not implemented",
        "structured_outputs": "structured outputs are not implemented",
        "guided_json": "structured outputs are not implemented",
        "guided_regex": "structured outputs are not implemented",
        "guided_choice": "structured outputs are not implemented",
        "guided_grammar": "structured outputs are not implemented",
        "prompt_embeds": "only text and token ids are taken",
        "truncate_prompt_tokens": "prompts are never cut; shorten it",
    }

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Strings | None = None
    stop: StringOrStrings | None = None
    stop_token_ids: (
        Annotated[list[int], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    prompt_logprobs: LogprobCount | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @field_validator("response_format")
    @classmethod
    def _only_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise PydanticCustomError(
                "unsupported_value", "only the type 'text' is supported by this server"
            )
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _conflict("stream_options", "it is only allowed when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise _conflict("prompt_logprobs", "it is not available when stream is true")
        return self

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling_params(self, **overrides: Any) -> SamplingParams:
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given["output_kind"] = (
            RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        )
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**(chosen | overrides))


_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


class CompletionRequest(GenerationRequest):
    REFUSED: ClassVar[dict[str, str]] = GenerationRequest.REFUSED | {
        "suffix": "this model does not fill in the middle"
    }

    prompt: PromptField
    logprobs: LogprobCount | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if len(self.prompts) * self.num_choices > MAX_PROMPTS:
            raise _conflict("n", f"prompts times n must not be more than {MAX_PROMPTS}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more; a single one in a list of its own."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError for values that do not go together."""
        overrides: dict[str, Any] = {"logprobs": self.logprobs}
        if self.max_tokens is not None:
            overrides["max_tokens"] = self.max_tokens
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            overrides["prompt_logprobs"] = self.logprobs
        return self._sampling_params(**overrides)


class ChatMessage(RequestObject):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "content")
        return self

    def as_template_message(self) -> dict[str, Any]:
        """``developer`` is OpenAI's newer word for ``system``; templates know the old one."""
        message = self.model_dump(exclude_unset=True)
        return message | {"role": "system"} if self.role == "developer" else message


class ChatCompletionRequest(GenerationRequest):
    REFUSED: ClassVar[dict[str, str]] = GenerationRequest.REFUSED | {
        "chat_template": "the model's own template is used",
        "functions": "use tools",
        "function_call": "use tools",
        "documents": "put them into messages",
        "audio": "only text is generated",
    }

    messages: Annotated[
        list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: Any = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_own_names(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, item in (value or {}).items():
            if name in _TEMPLATE_NAMES or name.endswith("_token"):
                raise PydanticCustomError(
                    "unsupported_value",
                    "a request cannot set the template's variable '{name}'",
                    {"name": name[:64]},
                )
            if item is not None and not isinstance(item, str | int | float):
                raise PydanticCustomError(
                    "unsupported_value", "values must be strings, numbers, booleans or null"
                )
        return value

    @field_validator("tool_choice")
    @classmethod
    def _only_auto(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise PydanticCustomError(
                "unsupported_value", "only 'none' and 'auto' are supported by this server"
            )
        return value

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "it needs logprobs to be true")
        return self

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError for values that do not go together."""
        limit = self.max_completion_tokens
        return self._sampling_params(
            max_tokens=self.max_tokens if limit is None else limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of ``Tokenizer.apply_chat_template``."""
        continues = bool(self.continue_final_message)
        generates = self.add_generation_prompt
        return (self.chat_template_kwargs or {}) | {
            "add_generation_prompt": not continues if generates is None else generates,
            "continue_final_message": continues,
            "tools": None if self.tool_choice == "none" else self.tools or None,
        }


_TEMPLATE_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "raise_exception",
        "strftime_now",
    }
)


def _conflict(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})
