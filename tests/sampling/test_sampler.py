"""The sampler: each row alone, each parameter against a few lines of NumPy."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxllm.errors import InvalidRequestError
from jaxllm.sampling.logprobs import PROMPT_CHUNK, largest, prompt_logprobs
from jaxllm.sampling.metadata import Logprobs, SamplerOutput
from jaxllm.sampling.sampler import full_tokens, greedy_tokens, random_tokens
from jaxllm.sampling.token_mask import RowMask, mask_words
from jaxllm.sampling_params import MIN_REPETITION_PENALTY, MIN_TEMPERATURE, SamplingParams
from tests.fakes.sampling_metadata import metadata

VOCAB = 70
_full = jax.jit(functools.partial(full_tokens, platform="cpu"))


def run(
    logits: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    seen: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    **values: np.ndarray,
) -> SamplerOutput:
    """Of the FULL mode."""
    rows, vocab = logits.shape
    return _full(
        jnp.asarray(logits),
        metadata(rows, **values),
        jnp.asarray(np.zeros((rows, vocab), np.int16) if counts is None else counts),
        jnp.asarray(np.zeros((rows, vocab), np.bool_) if seen is None else seen),
        jnp.asarray(np.full((rows, mask_words(vocab)), -1, np.int32) if mask is None else mask),
    )


def scored(out: SamplerOutput) -> Logprobs:
    assert out.logprobs is not None
    return out.logprobs


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2.0, size=(rows, VOCAB)).astype(np.float32)


def seeds(*values: int) -> np.ndarray:
    return np.array([[0, value] for value in values], np.int32)


def test_greedy_is_argmax() -> None:
    logits = random_logits(5)
    np.testing.assert_array_equal(run(logits).token_ids, logits.argmax(axis=1))


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = np.repeat(random_logits(1), 6, axis=0)
    temperature = np.ones(6, np.float32)
    seed, position = seeds(1, 1, 2, 1, 3, 4), np.array([5, 5, 5, 6, 5, 5], np.int32)
    together = np.asarray(
        run(logits, temperature=temperature, seed=seed, position=position).token_ids
    )
    for row in range(6):
        alone = run(
            logits[row : row + 1],
            temperature=temperature[:1],
            seed=seed[row : row + 1],
            position=position[row : row + 1],
        )
        assert int(alone.token_ids[0]) == together[row]
    assert together[0] == together[1]
    assert len(set(together.tolist())) > 2


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 4000 draws at temperature 0.7 after top-k 5."""
    rows = 4000
    logits = np.repeat(random_logits(1, seed=4), rows, axis=0)
    out = run(
        logits,
        temperature=np.full(rows, 0.7, np.float32),
        top_k=np.full(rows, 5, np.int32),
        seed=seeds(*range(rows)),
    )
    best = np.argsort(-logits[0])[:5]
    probability = np.exp(logits[0][best].astype(np.float64) / 0.7)
    probability /= probability.sum()
    observed = np.array([(np.asarray(out.token_ids) == token).sum() for token in best])
    assert observed.sum() == rows
    chi_square = ((observed - rows * probability) ** 2 / (rows * probability)).sum()
    assert chi_square < 18.5  # 99.9 % of 4 degrees of freedom


def test_penalties() -> None:
    logits = random_logits(1)
    counts, seen = np.zeros((1, VOCAB), np.int16), np.zeros((1, VOCAB), np.bool_)
    counts[0, 3], counts[0, 9], seen[0, 11] = 2, 1, True
    want = logits[0].copy()
    for token in (3, 9, 11):
        want[token] = want[token] / 1.5 if want[token] > 0 else want[token] * 1.5
    want -= 0.5 * counts[0] + 0.25 * (counts[0] > 0)
    out = run(
        np.repeat(logits, 2, axis=0),
        counts=np.repeat(counts, 2, axis=0),
        seen=np.repeat(seen, 2, axis=0),
        repetition_penalty=np.array([1.5, 1.0], np.float32),
        frequency_penalty=np.array([0.5, 0.0], np.float32),
        presence_penalty=np.array([0.25, 0.0], np.float32),
    )
    assert out.token_ids.tolist() == [want.argmax(), logits[0].argmax()]
    # and where the penalised token was the best one
    counts[0, logits.argmax()] = 1
    out = run(logits, counts=counts, frequency_penalty=np.array([100.0], np.float32))
    assert int(out.token_ids[0]) == np.argsort(-logits[0])[1]


def test_a_repetition_penalty_that_would_overflow_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="repetition_penalty must be between 1e-10 and"):
        SamplingParams(repetition_penalty=1e-38)
    logits = random_logits(1)
    out = run(
        logits,
        seen=np.ones((1, VOCAB), np.bool_),
        repetition_penalty=np.array([MIN_REPETITION_PENALTY], np.float32),
        temperature=np.array([MIN_TEMPERATURE], np.float32),
    )
    assert out.finite.tolist() == [True] and int(out.token_ids[0]) == logits.argmax()


def test_bias_and_stop_ban() -> None:
    logits = random_logits(2)
    out = run(
        logits,
        num_bias=np.array([1, 0], np.int32),
        bias_ids=np.array([[7, 8, 8, 8]] * 2, np.int32),
        bias_values=np.full((2, 4), 100.0, np.float32),
    )
    assert out.token_ids.tolist() == [7, logits[1].argmax()]
    best = logits.argmax(axis=1)
    out = run(
        logits,
        position=np.array([4, 5], np.int32),
        stop_ban_end=np.array([5, 5], np.int32),
        num_stop_ids=np.array([1, 1], np.int32),
        stop_ids=np.stack([best] * 4, axis=1).astype(np.int32),
    )
    assert out.token_ids[0] == np.argsort(-logits[0])[1]
    assert out.token_ids[1] == best[1]


def test_host_masks_allow_and_forbid() -> None:
    logits = random_logits(2)
    mask = np.full((2, mask_words(VOCAB)), -1, np.int32)
    RowMask(VOCAB, (31, 32, 69), ()).narrow(mask[0])
    best = int(logits[1].argmax())
    words = RowMask(VOCAB, None, ((5, best), (7,)))
    words.narrow(mask[1])
    out = run(logits, mask=mask)
    allowed = np.array([31, 32, 69])
    assert out.token_ids.tolist() == [allowed[logits[0][allowed].argmax()], best]
    words.extend((5,))
    words.narrow(mask[1])
    assert int(run(logits, mask=mask).token_ids[1]) == np.argsort(-logits[1])[1]


def test_a_row_that_is_not_finite_is_reported_alone() -> None:
    logits = random_logits(3)
    logits[1, 4] = np.nan
    out = run(logits, temperature=np.ones(3, np.float32), seed=seeds(1, 2, 3))
    assert out.finite.tolist() == [True, False, True]
    clean = random_logits(3)
    want = run(clean, temperature=np.ones(3, np.float32), seed=seeds(1, 2, 3))
    assert out.token_ids[0] == want.token_ids[0] and out.token_ids[2] == want.token_ids[2]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(2)
    out = run(
        logits,
        num_bias=np.array([1, 0], np.int32),
        bias_ids=np.full((2, 4), 7, np.int32),
        bias_values=np.full((2, 4), 100.0, np.float32),
    )
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row, token in enumerate(out.token_ids.tolist()):
        np.testing.assert_allclose(scored(out).token[row], exact[row, token], atol=1e-5)
        assert scored(out).rank[row] == 1 + (logits[row] > logits[row, token]).sum()
        order = np.argsort(-logits[row])[:20]
        assert scored(out).top_ids[row].tolist() == order.tolist()
        np.testing.assert_allclose(scored(out).top[row], exact[row, order], atol=1e-5)


def test_a_small_vocabulary_has_as_few_alternatives() -> None:
    logits = random_logits(2)[:, :7]
    out = run(logits)
    assert scored(out).top_ids.shape == (2, 7)
    assert sorted(scored(out).top_ids[0].tolist()) == list(range(7))
    assert np.isfinite(np.asarray(scored(out).top)).all()


def test_parameters_that_forbid_every_token_fail_their_row_only() -> None:
    """The argmax of nothing but -inf would be token 0, which is forbidden as well."""
    logits = random_logits(3)
    mask = np.full((3, mask_words(VOCAB)), -1, np.int32)
    RowMask(VOCAB, (5,), ((5,),)).narrow(mask[0])
    RowMask(VOCAB, (5,), ()).narrow(mask[1])
    temperature = np.array([1.0, 1.0, 0.0], np.float32)
    out = run(logits, mask=mask, temperature=temperature)
    assert out.finite.tolist() == [False, True, True]
    assert int(out.token_ids[1]) == 5


def test_every_mode_draws_the_same_for_rows_that_ask_for_no_more() -> None:
    """So a row does not notice when its neighbours move the step to another mode."""
    logits = random_logits(6)
    temperature = np.array([0.0, 1.0, 0.8, 1.2, 1.0, 0.0], np.float32)
    values = {
        "top_k": np.array([0, 0, 5, 0, 0, 3], np.int32),
        "top_p": np.array([1.0, 1.0, 1.0, 0.7, 1.0, 0.5], np.float32),
        "min_p": np.array([0.0, 0.0, 0.0, 0.0, 0.1, 0.0], np.float32),
        "seed": seeds(*range(6)),
    }
    want = run(logits, temperature=temperature, **values)
    md = metadata(6, temperature=temperature, **values)
    got = random_tokens(jnp.asarray(logits), md, platform="cpu")
    assert got.token_ids.tolist() == want.token_ids.tolist()
    assert (
        len({int(a) == int(b) for a, b in zip(want.token_ids, logits.argmax(1), strict=True)}) == 2
    )
    greedy = run(logits, **values)
    for platform in ("cpu", "gpu"):
        got = greedy_tokens(jnp.asarray(logits), platform=platform)
        assert got.token_ids.tolist() == greedy.token_ids.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("mode", "platform"), [("random", "gpu"), ("full", "gpu"), ("full", "sm_90")]
)
def test_no_gpu_waits_for_the_host_to_read_a_condition(mode: str, platform: str) -> None:
    """Nothing that XLA branches on; a loop only with a number of rounds that is known before."""
    rows, vocab = 8, 1024

    def step(logits: Any, md: Any, counts: Any, seen: Any, mask: Any) -> SamplerOutput:
        if mode == "random":
            return random_tokens(logits, md, platform=platform)
        return full_tokens(logits, md, counts, seen, mask, platform=platform)

    shapes = jax.eval_shape(lambda: metadata(rows))
    args = [
        jax.ShapeDtypeStruct((rows, width), dtype)
        for width, dtype in ((vocab, jnp.float32), (vocab, jnp.int16), (vocab, jnp.bool_))
    ]
    mask = jax.ShapeDtypeStruct((rows, mask_words(vocab)), jnp.int32)
    traced = jax.jit(step).trace(args[0], shapes, *args[1:], mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.case" not in text and "stablehlo.if" not in text
    assert text.count("@mosaic_gpu_v2") == (3 if platform == "sm_90" else 0)
    loops = text.split("stablehlo.while")[1:]
    assert len(loops) == (0 if platform == "sm_90" else 2)
    for loop in loops:  # counts to a constant
        condition = loop.split("} do {")[0]
        assert re.search(
            r"(%\w+) = stablehlo.constant dense<8> .*\n.*LT, %iterArg\w*, \1,", condition
        )


@pytest.mark.parametrize("scale", [1e4, 2.0], ids=["distinct", "many ties"])
@pytest.mark.parametrize("columns", [1281, 1500, 4096])
def test_the_largest_are_those_of_a_sort(columns: int, scale: float) -> None:
    x = np.random.default_rng(columns).normal(scale=scale, size=(3, columns)).round()
    x = x.astype(np.float32)
    x[1, 40:] = -np.inf
    x[2] = 0.0
    values, ids = largest(jnp.asarray(x), 20)
    want_values, want_ids = lax.top_k(jnp.asarray(x), 20)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(ids, want_ids)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
def test_a_prompt_of_any_length_is_scored(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    weight = rng.normal(size=(VOCAB, 4)).astype(np.float32)
    hidden = rng.normal(size=(tokens, 4)).astype(np.float32)
    targets = rng.integers(0, VOCAB, tokens).astype(np.int32)

    class Model:
        def compute_logits(self, part: jnp.ndarray) -> jnp.ndarray:
            assert part.shape == (PROMPT_CHUNK, 4), "memory must not depend on the prompt"
            return part @ weight.T

    model: Any = Model()
    found = prompt_logprobs(model, jnp.asarray(hidden), jnp.asarray(targets))
    exact = (hidden @ weight.T).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found.token, exact[np.arange(tokens), targets], atol=1e-5)
    assert found.top_ids.shape == (tokens, 20)
    np.testing.assert_array_equal(found.top_ids[:, 0], exact.argmax(axis=1))
