"""Beam search: answers that are the most likely as a whole, by asking for one token at a time.

Knows prompts and log-probabilities. The engine knows nothing of beams: a step of one is an ordinary
request for one token, whose keys and values are found in the prefix cache.
"""

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

from jaxllm.errors import RequestFailedError
from jaxllm.frontend.input_processor import room_for
from jaxllm.messages import ModelInfo
from jaxllm.outputs import BeamSearchSequence, PositionLogprobs, RequestOutput
from jaxllm.sampling_params import BeamSearchParams, SamplingParams
from jaxllm.tokenizer.incremental import detokenizer
from jaxllm.tokenizer.tokenizer import Tokenizer


class _Candidate(NamedTuple):
    cum_logprob: float
    parent: int  # which of the live beams it goes on from
    token_id: int


class BeamSearch:
    """One prompt's search: ``prompts`` wait for the next token's scores, ``advance`` takes them.

    As in vLLM, each beam is continued by its ``2 * beam_width`` most likely tokens; those that end
    the answer complete a sequence, and of all others the ``beam_width`` best go on. It ends where
    no live beam can come among the best any more, so ending early changes no result.

    Raises:
        ContextLengthExceededError: prompt and ``max_tokens`` do not fit together.
    """

    def __init__(self, prompt_token_ids: Sequence[int], params: BeamSearchParams, info: ModelInfo):
        self._params = params
        self._prompt_len = len(prompt_token_ids)
        self._max_tokens = room_for(self._prompt_len, params.max_tokens, info)
        self._eos = frozenset(() if params.ignore_eos else info.eos_token_ids)
        self._live = [BeamSearchSequence(list(prompt_token_ids))]
        self._completed: list[BeamSearchSequence] = []

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the live beams, prompt and answer; none once the search has ended."""
        return [beam.tokens for beam in self._live]

    @property
    def sequences(self) -> list[BeamSearchSequence]:
        """The ``beam_width`` best so far that have come to an end, best first."""
        return self._completed

    def advance(self, scored: Sequence[PositionLogprobs]) -> None:
        """``scored``: the next token's log-probabilities, by live beam."""
        candidates = [
            _Candidate(beam.cum_logprob + entry.logprob, parent, token_id)
            for parent, (beam, position) in enumerate(zip(self._live, scored, strict=True))
            for token_id, entry in position.items()
            if entry.logprob > -inf
        ]
        candidates.sort(key=lambda candidate: -candidate.cum_logprob)
        width = self._params.beam_width
        ended = [c for c in candidates if c.token_id in self._eos][:width]
        running = [c for c in candidates if c.token_id not in self._eos][:width]
        parents = self._live
        self._complete([_child(parents, scored, c) for c in ended], "stop")
        self._live = [_child(parents, scored, c) for c in running]
        if self._live and self._length(self._live[0]) == self._max_tokens:
            self._complete(self._live, "length")
            self._live = []
        elif self._decided():
            self._live = []

    def _complete(self, sequences: Sequence[BeamSearchSequence], reason: str) -> None:
        for sequence in sequences:
            sequence.finish_reason = reason
        ranked = sorted(
            [*self._completed, *sequences],
            key=lambda s: -self._score(s.cum_logprob, self._length(s)),
        )
        self._completed = ranked[: self._params.beam_width]

    def _decided(self) -> bool:
        """Whether the live beam that promises most cannot beat the worst sequence that counts."""
        if not self._live or len(self._completed) < self._params.beam_width:
            return False
        best, worst = self._live[0], self._completed[-1]
        # A sum of log-probabilities only falls, so it is the length that may still help.
        helpful = self._max_tokens if self._params.length_penalty > 0 else self._length(best) + 1
        bound = self._score(best.cum_logprob, helpful)
        return bound <= self._score(worst.cum_logprob, self._length(worst))

    def _length(self, sequence: BeamSearchSequence) -> int:
        return len(sequence.tokens) - self._prompt_len

    def _score(self, cum_logprob: float, length: int) -> float:
        return cum_logprob / length**self._params.length_penalty


def _child(
    parents: Sequence[BeamSearchSequence],
    scored: Sequence[PositionLogprobs],
    candidate: _Candidate,
) -> BeamSearchSequence:
    parent = parents[candidate.parent]
    return BeamSearchSequence(
        [*parent.tokens, candidate.token_id],
        [*parent.logprobs, scored[candidate.parent]],
        candidate.cum_logprob,
    )


def step_params(params: BeamSearchParams, **more: Any) -> SamplingParams:
    """Of a request for the next token's scores."""
    return SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, **more)


def next_logprobs(output: RequestOutput) -> PositionLogprobs:
    """What such a request was for. Raises RequestFailedError."""
    scored = output.outputs[0].logprobs
    if output.error is not None or not scored:
        raise RequestFailedError(output.error or "The engine ended a beam without its scores.")
    return scored[0]


def answer_text(
    tokenizer: Tokenizer,
    sequence: BeamSearchSequence,
    num_prompt_tokens: int,
    *,
    skip_special_tokens: bool = True,
    include_stop: bool = False,
) -> str:
    """What a sequence adds to its prompt's text; without the token that ended it."""
    prompt = sequence.tokens[:num_prompt_tokens]
    silent_end = sequence.finish_reason == "stop" and not include_stop
    answer = sequence.tokens[num_prompt_tokens : -1 if silent_end else None]
    text = detokenizer(tokenizer, prompt, skip_special_tokens)
    return text.add(answer) + text.flush()
