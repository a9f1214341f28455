"""One request of a user: its ``n`` completions, merged into one RequestOutput."""

from collections.abc import Callable

from jaxllm.errors import JaxLLMError, RequestFailedError
from jaxllm.frontend.completion import Completion
from jaxllm.frontend.logprobs import position_logprobs
from jaxllm.messages import EngineCoreOutput, EngineCoreRequest
from jaxllm.outputs import PositionLogprobs, RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer


class RequestState:
    """Collects what the engine says about a request until somebody takes it.

    ``notify`` is called whenever ``take`` has something to give; it must be cheap and repeatable.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        children: tuple[EngineCoreRequest, ...],
        params: SamplingParams,
        tokenizer: Tokenizer,
        notify: Callable[[], None] = lambda: None,
    ):
        self.request_id = request_id
        self.child_ids = tuple(child.request_id for child in children)
        self.error: JaxLLMError | None = None
        self._prompt = prompt
        self.prompt_token_ids = list(children[0].prompt_token_ids)
        self.params = params
        self._tokenizer = tokenizer
        self._notify = notify
        self._completions = [
            Completion(index, children[0].prompt_token_ids, params, tokenizer)
            for index in range(len(children))
        ]
        self.num_cached_tokens = 0
        self._prompt_logprobs: list[PositionLogprobs | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self._prompt_logprobs_taken = False
        self._embedding: bytes | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or None not in [c.finish_reason for c in self._completions]

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """By completion; those that still run count as ended now."""
        other = "abort" if self.error is None else "error"
        return tuple(completion.finish_reason or other for completion in self._completions)

    def unfinished_ids(self) -> tuple[str, ...]:
        """The engine's names of the completions that still run."""
        pairs = zip(self.child_ids, self._completions, strict=True)
        return tuple(child for child, completion in pairs if not completion.finished)

    def is_running(self, index: int) -> bool:
        return self.error is None and not self._completions[index].finished

    def add_token(self, index: int, token_id: int) -> bool:
        """True: a stop string ended this completion; the engine must abort it."""
        stopped = self._completions[index].add_token(token_id)
        self._announce()
        return stopped

    def add_output(self, index: int, output: EngineCoreOutput) -> bool:
        """As ``add_token``, for an event."""
        if index == 0:
            self._add_prompt_logprobs(output)
            self._embedding = output.embedding or self._embedding
        if output.finish_reason == "error" and self.error is None:
            self.error = RequestFailedError(output.error or "The engine could not go on with it.")
        stopped = self._completions[index].add_output(output)
        self._announce()
        return stopped

    def abort(self) -> None:
        """End what still runs with finish_reason "abort"."""
        for completion in self._completions:
            completion.finish("abort")
        self._announce()

    def fail(self, error: JaxLLMError) -> None:
        """End the whole request with an error, unless it has ended already."""
        if not self.finished:
            self.error = error
            self._announce()

    def take(self) -> RequestOutput | None:
        """What there is to tell, as ``output_kind`` says, failures too; None if nothing."""
        kind = self.params.output_kind
        finished = self.finished
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        told = [c for c in self._completions if c.has_news]
        if not told and self.error is None:
            return None
        if kind is not RequestOutputKind.DELTA:
            told = self._completions
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.take(kind) for completion in told],
            finished=finished,
            prompt_logprobs=self._take_prompt_logprobs(kind),
            num_cached_tokens=self.num_cached_tokens,
            error=None if self.error is None else self.error.message,
            embedding=self._embedding,
        )

    def take_all(self) -> RequestOutput:
        """Everything there is, whatever was taken before."""
        everything = RequestOutputKind.CUMULATIVE
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.take(everything) for completion in self._completions],
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            error=None if self.error is None else self.error.message,
            embedding=self._embedding,
        )

    def _announce(self) -> None:
        if self.params.output_kind is not RequestOutputKind.FINAL_ONLY or self.finished:
            self._notify()

    def _add_prompt_logprobs(self, output: EngineCoreOutput) -> None:
        if self._prompt_logprobs is None:
            return
        count = self.params.prompt_logprobs or 0
        tokenizer = self._tokenizer if self.params.detokenize else None
        self._prompt_logprobs += [
            position_logprobs(scored, count, tokenizer) for scored in output.prompt_logprobs
        ]

    def _take_prompt_logprobs(
        self, kind: RequestOutputKind
    ) -> list[PositionLogprobs | None] | None:
        """They are complete before the first token; a stream of deltas carries them once."""
        if kind is RequestOutputKind.DELTA and self._prompt_logprobs_taken:
            return None
        self._prompt_logprobs_taken = True
        return self._prompt_logprobs
