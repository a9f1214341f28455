"""The text of one completion as it grows: one of the ``n`` of a request."""

from collections.abc import Sequence

from jaxllm.frontend.logprobs import position_logprobs
from jaxllm.frontend.stop_strings import StopStrings
from jaxllm.frontend.taps import taps_by_name
from jaxllm.messages import EngineCoreOutput, TapValue, TokenLogprobs
from jaxllm.outputs import CompletionOutput, PositionLogprobs
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.tokenizer.incremental import detokenizer
from jaxllm.tokenizer.tokenizer import Tokenizer


class Completion:
    """Detokenises, looks for stop strings, remembers what was handed out.

    What nobody has taken yet simply waits here, so a slow reader costs one completion's text and
    never a queue.
    """

    def __init__(
        self,
        index: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
    ):
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._tokenizer = tokenizer if params.detokenize else None
        self._detokenizer = (
            detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
            if params.detokenize
            else None
        )
        self._stops = StopStrings(params.stop or (), params.include_stop_str_in_output)
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._taps: list[TapValue] = []
        self._taken_pieces = self._taken_tokens = self._taken_taps = 0
        self._taken_finish = False

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def has_news(self) -> bool:
        if self.finished:
            return not self._taken_finish
        return len(self._token_ids) > self._taken_tokens

    def add_token(self, token_id: int, logprobs: TokenLogprobs | None = None) -> bool:
        """One more token. True: it completed a stop string, and the engine must be told."""
        self._record(token_id, logprobs)
        if self._detokenizer is None:
            return False
        return self._add_text(self._detokenizer.add((token_id,)))

    def add_output(self, output: EngineCoreOutput) -> bool:
        """An event of the engine. True: a stop string ended the completion first."""
        self._taps += output.taps
        token_ids = output.new_token_ids
        last = len(token_ids) - 1
        silent_end = output.finish_reason == "stop" and not self._params.include_stop_str_in_output
        for i, token_id in enumerate(token_ids):
            logprobs = output.logprobs[i] if i < len(output.logprobs) else None
            if i == last and silent_end:  # a stop token is reported, but is no part of the text
                self._record(token_id, logprobs)
            elif self.add_token(token_id, logprobs):
                return output.finish_reason is None  # else the engine knows
        if output.finish_reason is not None:
            self.finish(output.finish_reason, output.stop_reason)
        return False

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """The end. A stop string in the very last characters takes precedence over ``reason``."""
        if self.finished:
            return
        if self._detokenizer is not None and self._add_text(self._detokenizer.flush()):
            return
        self._append(self._stops.flush())
        self.finish_reason, self.stop_reason = reason, stop_reason

    def take(self, kind: RequestOutputKind) -> CompletionOutput:
        """What is new since the last call (DELTA), or everything."""
        tokens_from = pieces_from = taps_from = 0
        if kind is RequestOutputKind.DELTA:
            tokens_from, pieces_from = self._taken_tokens, self._taken_pieces
            taps_from = self._taken_taps
        else:
            self._pieces = ["".join(self._pieces)]
        self._taken_tokens, self._taken_pieces = len(self._token_ids), len(self._pieces)
        self._taken_finish, self._taken_taps = self.finished, len(self._taps)
        scored = self._logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces[pieces_from:]),
            token_ids=self._token_ids[tokens_from:],
            cumulative_logprob=self._cumulative_logprob if scored else None,
            logprobs=self._logprobs[tokens_from:] if self._logprobs is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            taps=taps_by_name(self._taps[taps_from:]) if self._params.taps else None,
        )

    def _record(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self._token_ids.append(token_id)
        if self._logprobs is not None and logprobs is not None:
            self._cumulative_logprob += logprobs.logprob
            count = self._params.logprobs or 0
            self._logprobs.append(position_logprobs(logprobs, count, self._tokenizer))

    def _add_text(self, text: str) -> bool:
        if not text:
            return False
        if len(self._token_ids) <= self._params.min_tokens:
            self._append(text)  # too early to stop
            return False
        self._append(self._stops.feed(text))
        if self._stops.matched is None:
            return False
        self.finish_reason, self.stop_reason = "stop", self._stops.matched
        return True

    def _append(self, text: str) -> None:
        if text:
            self._pieces.append(text)
