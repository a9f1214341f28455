"""Every registered attention layer, served by the real engine, beside its paper in float64.

One model has them all, so the pages of its layers differ in shape; and it is a prefix LM, so that
a request may name first tokens that see ahead.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.attention.layers import ATTENTION_LAYERS, find_layer
from jaxllm.config.model import AttentionChoice, LatentConfig, RowParam
from jaxllm.config.plan import make_buckets
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from tests.fakes import dense_model
from tests.fakes.tiny_engine import TINY, Answer, TinyEngine, request, tiny_plan

NAMES = ATTENTION_LAYERS.names()
LATENT = LatentConfig(q_rank=12, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=10)
MODEL = replace(
    TINY,
    num_layers=len(NAMES),
    sliding_windows=tuple(24 if name == "nope" else None for name in NAMES),
    attention_layers=NAMES,
    attention=(AttentionChoice("prefix_lm"),) * len(NAMES),
    latent=LATENT,
)
ROWS, TOKENS = 4, 32
LONGEST = TOKENS - ROWS + 1
TEXT = np.random.default_rng(5).integers(0, MODEL.vocab_size, 80).tolist()


@pytest.fixture(scope="module")
def engine() -> TinyEngine:
    plan = tiny_plan(
        model=MODEL,
        max_num_seqs=ROWS,
        max_num_batched_tokens=TOKENS,
        buckets=make_buckets((ROWS,), (TOKENS,), ROWS),
        attention_params=(RowParam("prefix_len", None, True, LONGEST),),
    )
    return TinyEngine(plan)


def ask(name: str, prompt: list[int], span: int = 0, max_tokens: int = 14) -> EngineCoreRequest:
    """Log-probabilities of the prompt are asked for where there is no span: they take computing it
    all, and spans are to meet the cache."""
    scored = {"prompt_logprobs": 0} if not span else {}
    brought = {"prefix_len": span} if span else None
    return request(name, prompt, max_tokens, logprobs=0, attention_params=brought, **scored)


REQUESTS = [
    ask("short", TEXT[:3]),
    ask("long", TEXT[:60]),
    ask("span", TEXT[:40], 20),
    ask("same span", TEXT[:50], 20),
    ask("wider span", TEXT[:50], LONGEST),
    ask("all of it", TEXT[:18], 18),
    ask("other end of the span", [*TEXT[:18], 1, 2, *TEXT[20:40]], 20),
]


def check(engine: TinyEngine, answers: dict[str, Answer]) -> None:
    for asked in REQUESTS:
        answer, brought = answers[asked.request_id], asked.sampling_params.attention_params or {}
        prompt = list(asked.prompt_token_ids)
        tokens = [*prompt, *answer.token_ids]
        wanted = dense_model.logprobs(
            engine.model, engine.params, tokens, int(str(brought.get("prefix_len", 0)))
        )
        made = np.array(answer.token_ids)
        assert (wanted[len(prompt) - 1 : -1].argmax(axis=1) == made).all(), asked.request_id
        scored = [*answer.prompt_logprobs, *answer.logprobs]
        got = [entry.logprob for entry in scored]
        following = tokens[-len(got) :]
        picked = wanted[np.arange(-len(got) - 1, -1), following]
        np.testing.assert_allclose(got, picked, atol=2e-4, err_msg=asked.request_id)


def cores(engine: TinyEngine) -> Iterator[tuple[EngineCore, int]]:
    """With how many steps between arrivals."""
    yield engine.core(), 0
    yield engine.core(), 3
    yield engine.core(num_blocks=9, offloading=True, async_scheduling=False), 1


def test_every_layer_has_a_reference() -> None:
    assert set(NAMES) == set(dense_model.LAYERS)


def test_answers_are_the_papers(engine: TinyEngine) -> None:
    """Whole, in chunks, decoded, from the cache, after preemptions and from the host's memory."""
    for core, join in cores(engine):
        for _ in range(1 + core.scheduler.plan.offloading):  # the second time from the host
            check(engine, engine.run(REQUESTS, core, join))
        assert core.scheduler.kv_cache.num_hit_tokens > 0
    assert core.stats().num_preemptions > 0
    assert core.stats().num_blocks_loaded > 0


def test_a_span_is_shared_as_a_whole(engine: TinyEngine) -> None:
    core = engine.core()
    for asked, hits in ((REQUESTS[2], 0), (REQUESTS[3], 40), (REQUESTS[6], 0), (REQUESTS[4], 0)):
        before = core.scheduler.kv_cache.num_hit_tokens
        engine.run([asked], core)
        assert core.scheduler.kv_cache.num_hit_tokens - before == hits, asked.request_id


def test_a_span_that_no_step_holds_is_refused(engine: TinyEngine) -> None:
    with pytest.raises(InvalidRequestError, match=f"from 0 to {LONGEST}"):
        engine.core().add_request(ask("wide", TEXT, LONGEST + 1))


def test_a_block_holds_what_its_layers_keep() -> None:
    pairs = 2 * TINY.num_kv_heads * TINY.head_dim
    widths = {"latent": LATENT.kv_rank + LATENT.rope_dim}
    widths["forgetting"] = pairs + TINY.num_kv_heads
    per_token = sum(widths.get(name, pairs) for name in NAMES)
    assert bytes_per_block(MODEL, 16, "float32") == 4 * 16 * per_token


def test_names_and_files(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from jaxllm.layers.attention import Attention\n\nclass Mine(Attention):\n    pass\n"
    )
    assert find_layer(str(file)) is find_layer(str(file))
    assert find_layer(f"{file}:Mine").__name__ == "Mine"
    for name, message in (("no", "known: rotary"), (f"{file}:No", "attention layers \\(Mine\\)")):
        with pytest.raises(ConfigError, match=message):
            find_layer(name)
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        find_layer("latent").spec_of(TINY, 0)
    with pytest.raises(ConfigError, match="even number"):
        find_layer("differential").spec_of(replace(TINY, num_kv_heads=1), 0)
