"""Every wrong request is refused before the engine hears of it."""

import random
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from jaxllm.errors import ContextLengthExceededError, InvalidRequestError
from jaxllm.frontend.input_processor import InputProcessor
from jaxllm.frontend.parallel_sampling import fan_out
from jaxllm.messages import EngineCoreRequest, ModelInfo
from jaxllm.sampling_params import SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def inputs(info: ModelInfo, tokenizer: Tokenizer) -> InputProcessor:
    return InputProcessor(info, tokenizer, random.Random(0))


def request(
    inputs: InputProcessor, params: SamplingParams, prompt: Any = "ab"
) -> EngineCoreRequest:
    return inputs.process("r", inputs.encode(prompt), params)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "empty"), ([], "empty"), ([258], "0 to 257"), ([-1], "0 to 257"), ([True], "bool"),
     (["a"], "integers"), ([1.0], "integers"), ("\udc00", "surrogate")],
)  # fmt: skip
def test_wrong_prompts(inputs: InputProcessor, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        inputs.encode(prompt)


@pytest.mark.parametrize(
    ("length", "max_tokens", "resolved"),
    [(10, None, 54), (10, 54, 54), (63, 1, 1), (63, None, 1), (10, 0, 0), (10, 5, 5)],
)
def test_max_tokens(inputs: InputProcessor, length: int, max_tokens: Any, resolved: int) -> None:
    assert (
        request(inputs, SamplingParams(max_tokens=max_tokens), "x" * length).max_tokens == resolved
    )


def test_an_answer_is_as_long_as_the_model_recommends(
    info: ModelInfo, tokenizer: Tokenizer
) -> None:
    inputs = InputProcessor(structs.replace(info, max_new_tokens=20), tokenizer, random.Random(0))
    for length, max_tokens, resolved in ((10, None, 20), (50, None, 14), (10, 30, 30), (10, 5, 5)):
        params = SamplingParams(max_tokens=max_tokens)
        assert request(inputs, params, "x" * length).max_tokens == resolved


def test_a_priority_needs_an_engine_that_schedules_by_it(
    info: ModelInfo, tokenizer: Tokenizer
) -> None:
    for takes_priority in (False, True):
        inputs = InputProcessor(info, tokenizer, random.Random(0), takes_priority=takes_priority)
        assert inputs.process("r", (1,), SamplingParams(), tenant="t").tenant == "t"
        if takes_priority:
            assert inputs.process("r", (1,), SamplingParams(), priority=-3).priority == -3
            continue
        with pytest.raises(InvalidRequestError, match="--scheduling-policy priority") as caught:
            inputs.process("r", (1,), SamplingParams(), priority=-3)
        assert caught.value.param == "priority"


def test_context_length_errors_hold_the_numbers(inputs: InputProcessor) -> None:
    with pytest.raises(ContextLengthExceededError, match=r"64 tokens, .* at most 64") as caught:
        inputs.encode("x" * 64)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(ContextLengthExceededError, match=r"10 .* 55 .* 65.* 64"):
        request(inputs, SamplingParams(max_tokens=55), "x" * 10)
    with pytest.raises(InvalidRequestError, match=r"min_tokens is 55"):
        request(inputs, SamplingParams(max_tokens=None, min_tokens=55), "x" * 10)


def test_a_text_far_too_long_is_not_encoded(
    inputs: InputProcessor, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(tokenizer.token_to_bytes(i)) for i in range(tokenizer.vocab_size))
    assert tokenizer.longest_token == longest
    with pytest.raises(ContextLengthExceededError, match=r"\d tokens, but"):
        inputs.encode("x" * 64 * longest)  # it might have been few enough
    monkeypatch.setattr(tokenizer, "encode", lambda *_: pytest.fail("it was encoded"))
    with pytest.raises(ContextLengthExceededError, match="characters") as caught:
        inputs.encode("x" * (64 * longest + 1))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids", "logit_bias"])
def test_ids_in_parameters(inputs: InputProcessor, name: str) -> None:
    def make(token_id: int) -> SamplingParams:
        value: Any = {token_id: 1.0} if name == "logit_bias" else [token_id]
        return SamplingParams(**{name: value})

    request(inputs, make(257))
    with pytest.raises(InvalidRequestError, match="258") as caught:
        request(inputs, make(258))
    assert caught.value.param == name


def test_seeds_are_drawn_once_and_reproducibly(info: ModelInfo, tokenizer: Tokenizer) -> None:
    def seeds() -> list[int | None]:
        inputs = InputProcessor(info, tokenizer, random.Random(3))
        return [request(inputs, SamplingParams()).sampling_params.seed for _ in range(4)]

    assert seeds() == seeds() and len(set(seeds())) == 4 and None not in seeds()


def test_n_children_have_seeds_and_names_of_their_own(inputs: InputProcessor) -> None:
    parent = request(inputs, SamplingParams(n=3, seed=10, prompt_logprobs=1))
    children = fan_out(parent, 3)
    assert [c.request_id for c in children] == ["0_r", "1_r", "2_r"]
    assert [c.sampling_params.seed for c in children] == [10, 11, 12]
    assert [c.sampling_params.n for c in children] == [1, 1, 1]
    assert [c.sampling_params.prompt_logprobs for c in children] == [1, None, None]
    assert fan_out(parent, 1)[0].request_id == "r"


def test_bad_words_with_and_without_a_space(inputs: InputProcessor, tokenizer: Tokenizer) -> None:
    params = SamplingParams(bad_words=["ab", " c", "ab"])
    expected = tuple(tuple(tokenizer.encode(w)) for w in ("ab", " ab", "c", " c"))
    assert request(inputs, params).bad_words_token_ids == expected
    assert request(inputs, SamplingParams()).eos_token_ids == (257,)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}<think>{# </think> #}"


@pytest.mark.parametrize(
    ("prompt", "begun"), [("Hi", False), ("Hi<think>\n", True), ("<think></think>\n", None)]
)
def test_a_budget_for_thoughts(tiny_tokenizer_dir: Path, prompt: str, begun: bool | None) -> None:
    backend = Tokenizer.from_dir(tiny_tokenizer_dir).backend
    tokenizer = Tokenizer(backend, chat_template=TEMPLATE)
    info = ModelInfo("fake", str(tiny_tokenizer_dir), 256, 258, (257,))
    inputs = InputProcessor(info, tokenizer, random.Random(0))
    params = SamplingParams(thinking_token_budget=5)
    request = inputs.process("a", tuple(tokenizer.encode(prompt)), params)
    thoughts = request.thoughts
    if begun is None:
        assert thoughts is None
        return
    assert thoughts is not None and (thoughts.begun, thoughts.budget) == (begun, 5)
    assert tokenizer.decode(thoughts.closing_ids) == "</think>\n\n"
    assert tokenizer.decode(thoughts.opening_ids) == "<think>" and not thoughts.offered
    assert inputs.process("b", (1, 2), SamplingParams()).thoughts is None


def test_a_budget_needs_to_know_thoughts(inputs: InputProcessor) -> None:
    with pytest.raises(InvalidRequestError, match="does not tell") as caught:
        inputs.process("a", (1, 2), SamplingParams(thinking_token_budget=5))
    assert caught.value.param == "thinking_token_budget"
