"""Embeddings of a real engine on a tiny model: the last token's final hidden state, length 1."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.config.plan import BatchBucket, BatchKind, make_buckets
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from tests.conformance.paged_forward import PagedForward
from tests.fakes.tiny_engine import TINY, TinyEngine, request, tiny_plan


@pytest.fixture(scope="module")
def embedder() -> TinyEngine:
    plan = tiny_plan(embeddings=True, max_num_batched_tokens=32)
    buckets = (*make_buckets((8,), (32,), 8), BatchBucket(16, 2, BatchKind.MIXED))
    return TinyEngine(replace(plan, buckets=buckets))


def embeddings(core: EngineCore, *requests: EngineCoreRequest) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for item in requests:
        core.add_request(item)
    while core.has_work():
        outputs = core.step()
        for event in outputs.events if outputs is not None else ():
            assert event.error is None
            if event.embedding is not None:
                assert event.finish_reason == "length" and not event.new_token_ids
                found[event.request_id] = np.frombuffer(event.embedding, "<f4")
    return found


def wish(name: str, prompt: list[int]) -> EngineCoreRequest:
    return request(name, prompt, 0, embed=True)


def prompt_of(length: int) -> list[int]:
    return np.random.RandomState(length).randint(0, TINY.vocab_size, length).tolist()


def last_hidden(engine: TinyEngine, prompt: list[int]) -> np.ndarray:
    """From the logits of a model without an engine: there are more of them than hidden numbers."""
    logits = PagedForward(engine.model, engine.params).logits(prompt)[-1]
    module = engine.model.merge(engine.params)
    rows = jax.numpy.eye(TINY.hidden_size, dtype="float32")
    output = np.asarray(module.compute_logits(rows), np.float64)  # [E, V]
    hidden = np.linalg.lstsq(output.T, logits.astype(np.float64), rcond=None)[0]
    return hidden / np.linalg.norm(hidden)


@pytest.mark.parametrize("length", [1, 5, 31, 100])  # 100: in several chunks
def test_it_is_the_models_last_hidden_state(embedder: TinyEngine, length: int) -> None:
    prompt = prompt_of(length)
    found = embeddings(embedder.core(), wish("a", prompt))["a"]
    assert found.dtype == np.float32 and found.shape == (TINY.hidden_size,)
    np.testing.assert_allclose(np.linalg.norm(found), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found, last_hidden(embedder, prompt), atol=2e-5)


def test_company_changes_nothing(embedder: TinyEngine) -> None:
    wishes = [wish(str(length), prompt_of(length)) for length in (1, 3, 40, 70, 9, 100)]
    core = embedder.core()
    core.add_request(request("text", prompt_of(7), 40))  # decodes beside them
    together = embeddings(core, *wishes)
    assert together.keys() == {item.request_id for item in wishes}
    for item in wishes:
        alone = embeddings(embedder.core(), item)[item.request_id]
        np.testing.assert_allclose(together[item.request_id], alone, atol=2e-6)


def test_a_row_that_is_used_again_forgets_the_wish(embedder: TinyEngine) -> None:
    core = embedder.core()
    embeddings(core, wish("a", prompt_of(4)))
    answers = embedder.run([request("b", prompt_of(4), 3)], core)
    assert len(answers["b"].token_ids) == 3


def test_an_engine_without_them_refuses_and_compiles_nothing(
    engine: TinyEngine, embedder: TinyEngine
) -> None:
    with pytest.raises(InvalidRequestError):
        engine.core().add_request(wish("a", [1]))
    for engine_, count in ((engine, 0), (embedder, 2)):  # one for each number of rows
        kinds = [program.kind for program in engine_.programs.working_memory().programs]
        assert kinds.count("embed") == count


def test_a_wish_for_tokens_too_is_refused(embedder: TinyEngine) -> None:
    for changes in ({"max_tokens": 3}, {"n": 2}):
        with pytest.raises(InvalidRequestError):
            replace(wish("a", [1]).sampling_params, **changes)
