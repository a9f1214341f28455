"""Beams over made-up models and over the real engine, against every sequence there is."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.errors import ContextLengthExceededError, InvalidRequestError
from jaxllm.frontend.beam_search import BeamSearch
from jaxllm.messages import ModelInfo
from jaxllm.outputs import BeamSearchSequence, Logprob, PositionLogprobs
from tests.conftest import tiny_hf_config

VOCAB, EOS, PROMPT = 4, 3, (1, 2)
INFO = ModelInfo("made-up", None, 16, VOCAB, (EOS,))
Table = dict[tuple[int, ...], np.ndarray]


class MadeUpModel:
    """Each prefix has next-token probabilities of its own."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._table: Table = {}
        self.num_scored = 0

    def logprobs(self, prefix: Sequence[int]) -> np.ndarray:
        key = tuple(prefix)
        if key not in self._table:
            logits = self._rng.normal(size=VOCAB) * 2
            self._table[key] = logits - np.log(np.exp(logits).sum())
        return self._table[key]

    def top(self, prefix: Sequence[int], count: int) -> PositionLogprobs:
        self.num_scored += 1
        scored = self.logprobs(prefix)
        return {int(i): Logprob(float(scored[i])) for i in np.argsort(-scored)[:count]}

    def search(self, params: BeamSearchParams) -> list[BeamSearchSequence]:
        search = BeamSearch(PROMPT, params, INFO)
        while search.prompts:
            search.advance([self.top(p, 2 * params.beam_width) for p in search.prompts])
        return search.sequences


def all_answers(
    max_tokens: int, ends: bool, prefix: tuple[int, ...] = ()
) -> Iterator[tuple[int, ...]]:
    if prefix and ((ends and prefix[-1] == EOS) or len(prefix) == max_tokens):
        yield prefix
        return
    for token_id in range(VOCAB):
        yield from all_answers(max_tokens, ends, (*prefix, token_id))


def ranked(model: MadeUpModel, params: BeamSearchParams) -> list[tuple[float, tuple[int, ...]]]:
    """All answers there are, best first."""

    def score(answer: tuple[int, ...]) -> float:
        places = range(len(answer))
        total = sum(model.logprobs((*PROMPT, *answer[:i]))[answer[i]] for i in places)
        return total / len(answer) ** params.length_penalty

    answers = all_answers(params.max_tokens or 0, not params.ignore_eos)
    return sorted(((score(answer), answer) for answer in answers), reverse=True)


@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_search_as_wide_as_the_tree_finds_the_best(
    length_penalty: float, ignore_eos: bool
) -> None:
    """Three tokens go on after each prefix, so nine beams hold all of them for three steps."""
    num_tokens = 2 if ignore_eos else 3
    params = BeamSearchParams(
        beam_width=9, max_tokens=num_tokens, ignore_eos=ignore_eos, length_penalty=length_penalty
    )
    for seed in range(20):
        model = MadeUpModel(seed)
        found = model.search(params)
        expected = ranked(model, params)[:9]
        assert [tuple(s.tokens[2:]) for s in found] == [answer for _, answer in expected]
        for sequence, (score, answer) in zip(found, expected, strict=True):
            length = len(answer) ** length_penalty
            assert sequence.cum_logprob / length == pytest.approx(score)
            assert sequence.finish_reason == (
                "stop" if answer[-1] == EOS and not ignore_eos else "length"
            )
            assert len(sequence.logprobs) == len(answer)


def naive(model: MadeUpModel, params: BeamSearchParams) -> list[tuple[int, ...]]:
    """The same beams without ever ending early."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, (params.max_tokens or 0) + 1):
        longer = [
            (total + float(scored[t]), (*answer, t))
            for total, answer in live
            for scored in [model.logprobs((*PROMPT, *answer))]
            for t in range(VOCAB)
        ]
        ended = [(total, answer) for total, answer in longer if answer[-1] == EOS]
        live = sorted((c for c in longer if c[1][-1] != EOS), reverse=True)[: params.beam_width]
        ended += live if length == params.max_tokens else []
        done += [(total / length**params.length_penalty, answer) for total, answer in ended]
    return [answer for _, answer in sorted(done, reverse=True)[: params.beam_width]]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_ending_early_changes_nothing(length_penalty: float) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=10, length_penalty=length_penalty)
    num_scored = 0
    for seed in range(30):
        model = MadeUpModel(seed)
        found = [tuple(s.tokens[2:]) for s in model.search(params)]
        num_scored += model.num_scored
        assert found == naive(model, params)
    assert num_scored < 30 * (1 + 9 * 2)


def test_what_cannot_be_searched() -> None:
    for wrong in (
        {"beam_width": 0},
        {"beam_width": 11},
        {"max_tokens": 0},
        {"temperature": 0.7},
        {"length_penalty": float("nan")},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | wrong)  # pyright: ignore
        assert caught.value.param == next(iter(wrong))
    with pytest.raises(ContextLengthExceededError):
        BeamSearch(PROMPT, BeamSearchParams(beam_width=2, max_tokens=15), INFO)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A real engine whose model knows the bytes of "!\\"#" and one token that ends the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    directory = tmp_path_factory.mktemp("four_tokens")
    tokenizer = Tokenizer(models.BPE({"!": 0, '"': 1, "#": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    config = tiny_hf_config("llama") | {"vocab_size": VOCAB, "eos_token_id": EOS}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config))
    settings = {"load_format": "dummy", "dtype": "float32", "num_gpu_blocks_override": 65}
    with LLM(
        str(directory), max_num_seqs=4, max_num_batched_tokens=32, block_size=16, **settings
    ) as made:
        yield made


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -2.0])
def test_the_engine_against_every_answer(llm: LLM, length_penalty: float) -> None:
    prompts = ['!"#!"#!"#!"#!"#!"#!"#', [2, 2, 0, 1]]  # more than a block, and less
    params = BeamSearchParams(beam_width=9, max_tokens=3, length_penalty=length_penalty)
    answers = list(all_answers(3, True))
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        ids = llm.get_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        whole = llm.generate([[*ids, *answer] for answer in answers], scoring, use_tqdm=False)
        scores: dict[tuple[int, ...], float] = {}
        for answer, scored in zip(answers, whole, strict=True):
            positions = (scored.prompt_logprobs or [])[-len(answer) :]
            pairs = zip(answer, positions, strict=True)
            scores[answer] = sum(position[token].logprob for token, position in pairs if position)
        found = {tuple(s.tokens[len(ids) :]): s for s in output.sequences}
        for answer, sequence in found.items():
            assert sequence.cum_logprob == pytest.approx(scores[answer], abs=1e-4)
        value = {answer: total / len(answer) ** length_penalty for answer, total in scores.items()}
        order = [value[answer] for answer in found]
        assert order == pytest.approx(sorted(value.values(), reverse=True)[:9], abs=1e-4)
        assert all(high >= low - 1e-4 for high, low in pairwise(order))


def test_texts_and_shared_blocks(llm: LLM) -> None:
    before = llm.stats()
    prompt = '!"#' * 11  # two blocks and a token
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    (output,) = llm.beam_search(prompt, params)
    assert len(output.sequences) == 4
    for sequence in output.sequences:
        answer = sequence.tokens[33:]
        assert sequence.text == prompt + "".join('!"#'[t] for t in answer if t != EOS)
        assert sequence.finish_reason == "length" and len(answer) == 6
    asked = llm.stats().num_prefix_queries - before.num_prefix_queries
    hit = llm.stats().num_prefix_hits - before.num_prefix_hits
    assert asked == 33 + sum(4 * (33 + length) for length in range(1, 6))
    assert hit >= 20 * 32  # of each beam that follows the first step: two blocks


def test_completions_of_one_prompt_compute_it_once(llm: LLM) -> None:
    before = llm.stats()
    prompt = [0, 0, 1, 1, 2] * 4  # a block and four tokens
    params = SamplingParams(n=4, max_tokens=4, ignore_eos=True, seed=1)
    (first,) = llm.generate([prompt], params, use_tqdm=False)
    assert llm.stats().num_prefix_hits - before.num_prefix_hits == 3 * 16
    assert first.num_cached_tokens == 0
    (again,) = llm.generate([prompt], params, use_tqdm=False)
    assert 16 <= again.num_cached_tokens < 20
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in first.outputs]
