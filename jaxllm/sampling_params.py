"""What a request may ask of the sampler. Names and defaults are vLLM's; knows no text model, no
JAX.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import isfinite
from operator import index
from typing import SupportsIndex

from jaxllm.config.limits import MAX_N
from jaxllm.errors import InvalidRequestError
from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.parsers.family import ThoughtForm
from jaxllm.taps.interventions import Intervention, check_form
from jaxllm.taps.positions import TapPositions, check_positions
from jaxllm.taps.sites import check_names

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_BEAM_WIDTH = MAX_LOGPROBS // 2  # each step looks at twice as many tokens
MAX_LENGTH_PENALTY = 10.0
MIN_TEMPERATURE = 1e-5  # below it logits / temperature could overflow: that is greedy
MIN_REPETITION_PENALTY = 1e-10  # below it logits / penalty / temperature could overflow
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")


class RequestOutputKind(StrEnum):
    CUMULATIVE = "cumulative"  # every output holds everything so far
    DELTA = "delta"  # every output holds only what is new
    FINAL_ONLY = "final_only"  # one output, at the end


def _invalid(param: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, immutable and checked on construction.

    Raises:
        InvalidRequestError: a value is outside its range; ``param`` names the field.
    """

    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: a fresh one is drawn
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    # None: the model's max_new_tokens where its makers recommend one, else up to max_model_len.
    max_tokens: int | None = 16
    logprobs: int | None = None  # alternatives per generated token, 0..20
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    # What the engine's attention variant lets requests bring, by name: a number or a list each.
    attention_params: Mapping[str, float | Sequence[float]] | None = None
    # Activations to return and to change (jaxllm/taps); need an engine started with taps.
    taps: Sequence[str] | None = None
    tap_positions: TapPositions = "last"
    interventions: Sequence[Intervention] | None = None
    # The answer is the prompt's embedding: the last token's final hidden state, of length 1. Needs
    # max_tokens=0, and an engine started with enable_embeddings.
    embed: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    # Tokens that the model may think; then its thoughts are ended for it.
    thinking_token_budget: int | None = None
    # How it marks them; None: as its chat template does. A grammar begins behind them.
    thoughts: ThoughtForm | None = None
    output_kind: RequestOutputKind = field(default=RequestOutputKind.CUMULATIVE)

    def __post_init__(self) -> None:
        set_ = (
            object.__setattr__
        )  # normalise sequences once, so that equality and the wire are exact
        set_(self, "stop", _strings("stop", self.stop))
        set_(self, "bad_words", _strings("bad_words", self.bad_words))
        set_(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            set_(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise _invalid(
                    "allowed_token_ids", "allowed_token_ids must hold at least one token id."
                )
        if self.logit_bias is not None:
            set_(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.attention_params is not None:
            set_(self, "attention_params", _attention_params(self.attention_params))
        if self.taps is not None:
            set_(self, "taps", check_names(self.taps))
        set_(self, "tap_positions", check_positions(self.tap_positions))
        if self.interventions is not None:
            set_(self, "interventions", check_form(self.interventions))
        if self.top_k == -1:
            set_(self, "top_k", 0)
        self._check_numbers()
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            raise _invalid(
                "stop_token_ids", f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids."
            )
        if any(not s for s in self.stop or ()):
            raise _invalid("stop", "stop must not hold an empty string.")
        if self.stop and not self.detokenize:
            raise _invalid("stop", "stop strings need detokenize=True; use stop_token_ids instead.")
        if self.embed and (self.max_tokens != 0 or self.n != 1):
            raise _invalid("embed", "an embedding needs max_tokens=0 and n=1.")
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens > 0):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise _invalid(name, f"{name} cannot go with structured_outputs, which say the end.")
        if any(not w for w in self.bad_words or ()):
            raise _invalid("bad_words", "bad_words must not hold an empty string.")

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid(
                "min_tokens",
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).",
            )
        if self.thinking_token_budget is not None:
            _integer("thinking_token_budget", self.thinking_token_budget, 0, 2**31 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    def child(self, index: int) -> "SamplingParams":
        """Parameters of the ``index``-th of ``n`` parallel samples; each has a seed of its own."""
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        return replace(self, n=1, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """What ``LLM.beam_search`` looks for. Names are vLLM's.

    A sequence's score is the sum of its tokens' log-probabilities, as the model gives them, divided
    by ``length ** length_penalty``. As in transformers, the length is the answer's, with the token
    that ends it.

    Raises:
        InvalidRequestError: a value is outside its range; ``param`` names the field.
    """

    beam_width: int
    max_tokens: int | None  # None: as in SamplingParams
    ignore_eos: bool = False
    temperature: float = 0.0  # 0 or 1: scores are the model's own
    length_penalty: float = 1.0  # above 0 favours long answers, below 0 short ones
    include_stop_str_in_output: bool = False  # the end-of-sequence token stays in the text

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.temperature not in (0, 1):
            raise _invalid(
                "temperature",
                "beam search goes by the model's own probabilities: temperature must be 0 or 1, "
                f"got {self.temperature}.",
            )
        _number("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, f"{name} must be an integer, got {type(value).__name__}.")
    if not low <= value <= high:
        raise _invalid(name, f"{name} must be between {low} and {high}, got {value}.")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(name, f"{name} must be a number, got {type(value).__name__}.")
    if not isfinite(value) or not low <= value <= high or (above and value == low):
        bound = (
            f"greater than {low:g} and at most {high:g}"
            if above
            else f"between {low:g} and {high:g}"
        )
        raise _invalid(name, f"{name} must be {bound}, got {value}.")


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise _invalid(name, f"{name} must hold strings.")
    return items


def _token_ids(name: str, value: Sequence[int] | None) -> tuple[int, ...]:
    ids = tuple(value or ())
    for item in ids:
        _integer(name, item, 0, 2**31 - 1)
    return ids


def _attention_params(value: Mapping[str, object]) -> dict[str, float | tuple[float, ...]]:
    out: dict[str, float | tuple[float, ...]] = {}
    for name, given in value.items():
        numbers = tuple(given) if isinstance(given, list | tuple) else (given,)
        for number in numbers:
            _number(f"attention_params.{name}", number, -(2.0**31) + 1, 2.0**31 - 1)
        out[name] = numbers if isinstance(given, list | tuple) else numbers[0]  # pyright: ignore
    return out


def _token_id(key: object) -> int:
    """Of a key, which JSON has as a text: that of the number, so that no two texts are one id."""
    if isinstance(key, str):
        if _DECIMAL.fullmatch(key):
            return int(key)
    elif isinstance(key, SupportsIndex) and not isinstance(key, bool):
        return index(key)
    raise _invalid("logit_bias", f"logit_bias keys must be token ids, got {str(key)[:64]!r}.")


def _logit_bias(value: Mapping[int, float]) -> dict[int, float]:
    if len(value) > MAX_LOGIT_BIAS:
        raise _invalid(
            "logit_bias", f"logit_bias takes at most {MAX_LOGIT_BIAS} entries, got {len(value)}."
        )
    out: dict[int, float] = {}
    for key, bias in value.items():
        token_id = _token_id(key)
        _integer("logit_bias", token_id, 0, 2**31 - 1)
        _number("logit_bias", bias, -100.0, 100.0)
        out[token_id] = float(bias)
    return out
