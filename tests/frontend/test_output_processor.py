"""From the engine's tokens to the user's outputs."""

from collections.abc import Callable
from typing import Any

import pytest

from jaxllm.errors import EngineDeadError, InvalidRequestError
from jaxllm.frontend.output_processor import OutputProcessor
from jaxllm.frontend.parallel_sampling import fan_out
from jaxllm.frontend.request_state import RequestState
from jaxllm.messages import (
    Admission,
    EngineCoreOutput,
    EngineCoreRequest,
    StepOutputs,
    TokenLogprobs,
)
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer

Add = Callable[..., RequestState]
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
EOS_ID = 257


@pytest.fixture
def processor() -> OutputProcessor:
    return OutputProcessor()


@pytest.fixture
def add(processor: OutputProcessor, tokenizer: Tokenizer) -> Add:
    def add(name: str = "r", **params: Any) -> RequestState:
        sampling = SamplingParams(seed=1, **params)
        request = EngineCoreRequest(name, tuple(tokenizer.encode("prompt")), sampling, 99)
        children = fan_out(request, sampling.n)
        state = RequestState(name, "prompt", children, sampling, tokenizer)
        processor.add(state)
        return state

    return add


@pytest.fixture
def say(processor: OutputProcessor, tokenizer: Tokenizer) -> Callable[..., tuple[str, ...]]:
    """The engine says ``text`` to request ``name``, one token a step; returns what to abort."""

    def say(text: str, name: str = "r", finish: str | None = None) -> tuple[str, ...]:
        ids = tokenizer.encode(text)
        aborts: tuple[str, ...] = ()
        for step, token_id in enumerate(ids):
            if finish is not None and step == len(ids) - 1:
                event = EngineCoreOutput(name, (token_id,), finish_reason=finish)
                aborts += processor.process(StepOutputs(step, events=[event]))
            else:
                aborts += processor.process(StepOutputs(step, [name], [token_id]))
        return aborts

    return say


def taken(state: RequestState) -> RequestOutput:
    output = state.take()
    assert output is not None
    return output


def test_cumulative_delta_and_final(add: Add, say: Any) -> None:
    whole = add("whole")
    delta = add("delta", output_kind=DELTA)
    final = add("final", output_kind=FINAL)
    for name in ("whole", "delta", "final"):
        say("one", name)
    assert taken(whole).outputs[0].text == "one" == taken(delta).outputs[0].text
    assert (whole.take(), delta.take(), final.take()) == (None, None, None)
    for name in ("whole", "delta", "final"):
        say(" two", name, finish="length")
    outputs = [taken(state) for state in (whole, delta, final)]
    assert [o.outputs[0].text for o in outputs] == ["one two", " two", "one two"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [7, 4, 7]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert (whole.take(), delta.take(), final.take()) == (None, None, None)


def test_stop_string_across_tokens_aborts_and_cuts(add: Add, say: Any) -> None:
    state = add(stop=["two"], output_kind=DELTA)
    assert say("one t") == ()
    assert taken(state).outputs[0].text == "one "
    assert say("wo three") == ("r",)
    last = taken(state)
    assert (last.outputs[0].text, last.outputs[0].stop_reason) == ("", "two")
    assert last.finished and last.outputs[0].finish_reason == "stop"
    assert len(last.outputs[0].token_ids) == 2


def test_stop_string_kept_on_request(add: Add, say: Any) -> None:
    state = add(stop="two", include_stop_str_in_output=True)
    say("one two three")
    assert taken(state).outputs[0].text == "one two"


def test_held_back_text_comes_out_at_the_end(add: Add, say: Any) -> None:
    state = add(stop="stop!", output_kind=DELTA)
    say("non-sto", finish="length")
    assert taken(state).outputs[0].text == "non-sto"


def test_stop_strings_wait_for_min_tokens(add: Add, say: Any) -> None:
    state = add(stop="b", min_tokens=3)
    assert say("abcabc") == ("r",)
    assert taken(state).outputs[0].text == "abca"


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_stop_token_is_reported_but_not_spelled_out(
    add: Add, say: Any, include: bool, text: str
) -> None:
    state = add(include_stop_str_in_output=include)
    assert say("abc", finish="stop") == ()
    output = taken(state).outputs[0]
    assert (output.text, len(output.token_ids), output.stop_reason) == (text, 3, None)


def test_stop_string_before_the_engines_own_end(
    add: Add, processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    state = add(stop="b")
    ids = (*tokenizer.encode("abc"), EOS_ID)
    event = EngineCoreOutput("r", ids, finish_reason="stop")
    assert processor.process(StepOutputs(1, events=[event])) == ()
    output = taken(state).outputs[0]
    assert (output.text, output.stop_reason, len(output.token_ids)) == ("a", "b", 2)


def test_max_tokens_zero_yields_prompt_only(add: Add, processor: OutputProcessor) -> None:
    state = add(max_tokens=0)
    event = EngineCoreOutput("r", finish_reason="length")
    processor.process(StepOutputs(1, events=[event]))
    output = taken(state)
    assert output.finished and (output.outputs[0].text, output.outputs[0].token_ids) == ("", [])


def test_half_a_character_is_held_back(
    add: Add, processor: OutputProcessor, tokenizer: Any
) -> None:
    state = add(output_kind=DELTA)
    seen = []
    for token_id in tokenizer.encode("😀"):
        processor.process(StepOutputs(1, ["r"], [token_id]))
        seen.append(taken(state).outputs[0].text)
    assert seen == ["", "", "", "😀"]


def test_logprobs(add: Add, processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    state = add(logprobs=2, prompt_logprobs=1, output_kind=DELTA)
    a, b, c = tokenizer.encode("abc")
    prompt = (TokenLogprobs(a, -3.0, 9, (b, c), (-0.1, -0.2)),)
    processor.process(StepOutputs(1, events=[EngineCoreOutput("r", prompt_logprobs=prompt)]))
    assert state.take() is None
    for token_id, logprob in ((a, -0.5), (c, -2.0)):
        scored = TokenLogprobs(token_id, logprob, 1 if token_id == a else 7, (a, b), (-0.5, -1.0))
        event = EngineCoreOutput("r", (token_id,), logprobs=(scored,))
        processor.process(StepOutputs(1, events=[event]))
    output = taken(state)
    completion = output.outputs[0]
    assert completion.cumulative_logprob == -2.5
    assert completion.logprobs is not None
    first, second = completion.logprobs
    assert [(e.decoded_token, e.rank) for e in first.values()] == [("a", 1), ("b", 2)]
    assert [(e.decoded_token, e.rank) for e in second.values()] == [("c", 7), ("a", 1), ("b", 2)]
    assert output.prompt_logprobs is not None
    nothing, entry = output.prompt_logprobs
    assert nothing is None and entry is not None and list(entry) == [a, b]
    processor.process(StepOutputs(2, ["r"], [a]))
    assert taken(state).prompt_logprobs is None


def test_cached_tokens_are_known_from_the_first_token_on(
    add: Add, processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    """A stop string ends a request here, not in the engine."""
    state = add(stop="b", n=2)
    a, b = tokenizer.encode("ab")
    names = list(state.child_ids)
    admitted = [Admission(names[0], 0.0, 0.0, 4), Admission(names[1], 0.0, 0.0, 5)]
    processor.process(StepOutputs(1, names, [a, a], admitted=admitted))
    assert taken(state).num_cached_tokens == 4  # what only its sibling found was computed for it
    assert processor.process(StepOutputs(2, names, [b, b])) == tuple(names)
    output = taken(state)
    assert output.finished and output.num_cached_tokens == 4


def test_without_detokenization(add: Add, say: Any) -> None:
    state = add(detokenize=False, logprobs=0)
    say("abc", finish="length")
    output = taken(state).outputs[0]
    assert output.text == "" and len(output.token_ids) == 3


def test_n_completions_are_merged(add: Add, say: Any) -> None:
    state = add(n=2, output_kind=DELTA, stop="!")
    say("a", "0_r")
    assert [c.index for c in taken(state).outputs] == [0]
    assert say("b!", "1_r") == ("1_r",)
    output = taken(state)
    assert [c.index for c in output.outputs] == [1] and not output.finished
    say("c", "0_r", finish="length")
    assert taken(state).finished


def test_error_of_one_child_aborts_the_others(add: Add, processor: OutputProcessor) -> None:
    state = add(n=3)
    event = EngineCoreOutput("1_r", finish_reason="error", error="not finite")
    assert processor.process(StepOutputs(1, events=[event])) == ("0_r", "2_r")
    assert state.error is not None and taken(state).error == "not finite"


def test_text_that_cannot_be_made_fails_one_request(
    add: Add, say: Any, processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = add("bad"), add("good")
    monkeypatch.setattr(bad, "add_token", lambda *args: 1 // 0)
    assert processor.process(StepOutputs(1, ["bad", "good"], [1, 2])) == ("bad",)
    assert bad.error is not None and good.error is None and good.take() is not None


def test_abort_fail_and_unknown_ids(add: Add, say: Any, processor: OutputProcessor) -> None:
    state = add(output_kind=FINAL, stop="bc")
    say("ab")
    state.abort()
    output = taken(state)
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("abort", "ab")
    say("more")
    assert state.take() is None
    processor.remove(state)
    assert say("x", "nobody") == ()

    other = add()
    with pytest.raises(InvalidRequestError, match="already running"):
        add()
    processor.fail_all(EngineDeadError("gone"))
    assert isinstance(other.error, EngineDeadError) and other.finished
