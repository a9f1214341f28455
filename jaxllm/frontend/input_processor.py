"""From what a user asks to what the engine takes: text to ids, limits checked, seed drawn."""

import random
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from jaxllm.engine.request_validator import check_attention_params
from jaxllm.errors import ContextLengthExceededError, InvalidRequestError
from jaxllm.frontend.client import Prompt
from jaxllm.grammar.checker import GrammarChecker
from jaxllm.messages import EngineCoreRequest, ModelInfo, Thoughts
from jaxllm.parsers.choice import AUTO, NONE, choose
from jaxllm.sampling_params import SamplingParams
from jaxllm.taps.check import check_taps
from jaxllm.tokenizer.tokenizer import Tokenizer

PROMPT_END = 64  # tokens that tell whether a prompt has begun the thoughts, or ended them


def room_for(prompt_len: int, max_tokens: int | None, info: ModelInfo) -> int:
    """How many tokens an answer may have; ``max_tokens`` None: as many as the model is meant to
    write, if they fit.

    Raises:
        ContextLengthExceededError: prompt and ``max_tokens`` do not fit together.
    """
    room = info.max_model_len - prompt_len
    wanted = min(room, info.max_new_tokens or room) if max_tokens is None else max_tokens
    if wanted > room:
        raise ContextLengthExceededError(
            f"{prompt_len} prompt tokens and {wanted} tokens to generate make "
            f"{prompt_len + wanted}, but this model takes at most {info.max_model_len} "
            "in all. Shorten the prompt or lower max_tokens.",
            param="max_tokens",
        )
    return wanted


class InputProcessor:
    """Everything that can be wrong with a request is found here, before the engine hears of it."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        seeds: random.Random,
        *,
        takes_priority: bool = False,
    ):
        self._info = info
        self._tokenizer = tokenizer
        self._seeds = seeds
        self._takes_priority = takes_priority
        self._grammars = GrammarChecker(info.tokenizer_dir, info.vocab_size, info.eos_token_ids)

    def close(self) -> None:
        """End the processes that check grammars."""
        self._grammars.close()

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, checked against vocabulary and context length.

        Raises:
            InvalidRequestError: empty, not Unicode, or an id that the model does not have.
            ContextLengthExceededError: there is no room for even one more token.
        """
        if isinstance(prompt, str):
            self._check_text(prompt)
            token_ids = tuple(self._tokenizer.encode(prompt, add_special_tokens))
        else:
            token_ids = tuple(prompt)
            self._check_ids("prompt", token_ids)
        if not token_ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt", code="empty_prompt")
        if len(token_ids) >= self._info.max_model_len:
            raise ContextLengthExceededError(
                f"The prompt has {len(token_ids)} tokens, but this model takes at most "
                f"{self._info.max_model_len} tokens of prompt and output together.",
                param="prompt",
            )
        return token_ids

    def _check_text(self, text: str) -> None:
        """Refuse what is far too long without encoding it, which may take seconds."""
        most = self._info.max_model_len * self._tokenizer.longest_token
        if len(text) > most:
            raise ContextLengthExceededError(
                f"The prompt has {len(text)} characters, but this model takes at most "
                f"{self._info.max_model_len} tokens of prompt and output together, and no token "
                f"is longer than {self._tokenizer.longest_token} bytes.",
                param="prompt",
            )

    def check_grammar(self, params: SamplingParams) -> "Future[str]":
        """The ``grammar`` for ``process``; "" if nothing was asked for.

        Raises, in the future:
            InvalidRequestError: the engine could not honour it, or only at the cost of others.
        """
        if params.structured_outputs is not None:
            return self._grammars.submit(params.structured_outputs)
        nothing: Future[str] = Future()
        nothing.set_result("")
        return nothing

    def process(
        self,
        request_id: str,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        grammar: str = "",
        priority: int = 0,
        arrival_time: float = 0.0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> EngineCoreRequest:
        """The engine's request, its seed drawn; ``n`` is still the user's, for ``fan_out``.

        ``max_tokens=0`` scores or embeds the prompt and generates nothing. ``grammar`` is what
        ``check_grammar`` gave; the engine gets it instead of what was asked for.

        Raises:
            InvalidRequestError: a token id in ``params`` that the model does not have, or an
                embedding or a priority that the engine was not started for.
            ContextLengthExceededError: prompt and ``max_tokens`` do not fit together.
        """
        if params.embed and not self._info.embedding_size:
            raise InvalidRequestError(
                "This engine was not started for embeddings: start it with --enable-embeddings.",
                code="embeddings_not_enabled",
            )
        if priority and not self._takes_priority:
            raise InvalidRequestError(
                f"The priority is {priority}, but this engine does not schedule by it: start it "
                "with --scheduling-policy priority.",
                param="priority",
                code="priority_not_enabled",
            )
        max_tokens = self._max_tokens(len(prompt_token_ids), params)
        self._check_params(params)
        if params.structured_outputs is not None:
            if not grammar:
                raise ValueError("structured_outputs have not been checked.")
            params = replace(params, structured_outputs=None)
        known, count = self._info.attention_params, len(prompt_token_ids)
        check_attention_params(params.attention_params or {}, known, count)
        check_taps(params, len(prompt_token_ids), max_tokens, self._info.taps)
        thoughts = self._thoughts(params, prompt_token_ids, grammar)
        params = replace(params, thoughts=None)
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        return EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling_params=params,
            max_tokens=max_tokens,
            eos_token_ids=self._info.eos_token_ids,
            bad_words_token_ids=self._bad_words(params.bad_words or ()),
            grammar=grammar,
            thoughts=thoughts,
            priority=priority,
            arrival_time=arrival_time,
            tenant=tenant,
            cache_salt=cache_salt,
        )

    def _thoughts(
        self, params: SamplingParams, prompt_token_ids: tuple[int, ...], grammar: str
    ) -> Thoughts | None:
        """None where nobody needs to know where they are."""
        form, budget = params.thoughts, params.thinking_token_budget
        if budget is None and (form is None or not grammar):
            return None
        if form is None:
            template = self._tokenizer.chat_template
            reasoning = choose(NONE, AUTO, None if template is None else template.text).reasoning
            if reasoning is None or reasoning.marks is None:
                raise InvalidRequestError(
                    "This model's chat template does not tell how it marks its thoughts, so they "
                    "cannot be ended: say it in SamplingParams.thoughts, or with the server's "
                    "--reasoning-parser.",
                    param="thinking_token_budget",
                    code="no_thoughts",
                )
            end = self._tokenizer.decode(prompt_token_ids[-PROMPT_END:], skip_special_tokens=False)
            form = reasoning.form(end)
        if form is None:  # the prompt has ended them
            return None

        def ids(text: str) -> tuple[int, ...]:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))

        opening_ids = ids(form.opening)
        return Thoughts(
            opening=form.opening,
            closings=form.closings,
            opening_ids=opening_ids,
            closing_ids=ids(form.closings[0] + form.after),
            after_ids=ids(form.after),
            again=form.again,
            begun=form.begun,
            budget=budget,
            # A word that begins thoughts ("Here") begins much else, and would draw it all to them.
            offered=len(opening_ids) == 1 or opening_ids[0] in self._tokenizer.special_ids,
        )

    def _max_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        wanted = room_for(prompt_len, params.max_tokens, self._info)
        if params.min_tokens > wanted:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, but there is room for {wanted} tokens only.",
                param="min_tokens",
                code="invalid_value",
            )
        return wanted

    def _check_params(self, params: SamplingParams) -> None:
        allowed = params.allowed_token_ids or ()
        if len(allowed) > self._info.vocab_size:
            raise InvalidRequestError(
                f"allowed_token_ids holds {len(allowed)} ids; this model has "
                f"{self._info.vocab_size}.",
                param="allowed_token_ids",
                code="invalid_value",
            )
        self._check_ids("allowed_token_ids", allowed)
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("stop_token_ids", params.stop_token_ids or ())

    def _check_ids(self, param: str, token_ids: Iterable[object]) -> None:
        size = self._info.vocab_size
        for token_id in token_ids:
            if type(token_id) is not int:
                raise InvalidRequestError(
                    f"{param} must hold token ids (integers), got {type(token_id).__name__}.",
                    param=param,
                    code="invalid_value",
                )
            if not 0 <= token_id < size:
                raise InvalidRequestError(
                    f"{param} holds token id {token_id}; this model has ids 0 to {size - 1}.",
                    param=param,
                    code="invalid_value",
                )

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word at the start of a text and in its middle, where it begins with a space."""
        found: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        for word in words:
            bare = word.lstrip()
            for spelling in (bare, f" {bare}") if bare else (word,):
                token_ids = tuple(self._tokenizer.encode(spelling, add_special_tokens=False))
                if token_ids:
                    found[token_ids] = None
        return tuple(found)
