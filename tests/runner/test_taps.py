"""Taps and interventions of a real engine on a tiny model, held against a forward pass by hand."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.plan import BatchKind, make_buckets
from jaxllm.core.integrity import check_integrity
from jaxllm.engine.engine_core import EngineCore
from jaxllm.frontend.taps import taps_by_name
from jaxllm.messages import EngineCoreRequest, TapValue
from jaxllm.outputs import Tap
from jaxllm.runner import tapped_step
from jaxllm.runner.programs import Programs
from jaxllm.taps.interventions import AblateHead, Intervention, Patch, Steer
from tests.fakes.plain_forward import plain_forward
from tests.fakes.tiny_engine import TINY, TinyEngine, request, tiny_plan

ALL = [
    *(f"resid.{number}" for number in range(3)),
    *("attn_out.0", "attn_out.1", "attn_probs.0", "attn_probs.1", "logits.0", "logits.2"),
]
CLOSE = 2e-4


@pytest.fixture(scope="module")
def tapped() -> Iterator[TinyEngine]:
    """Of which a run reads so little that most steps run several times."""
    plan = tiny_plan(taps=True, max_num_batched_tokens=32)
    with pytest.MonkeyPatch.context() as patch:
        for name, most in (("_MOST_VECTORS", 16), ("_MOST_LENS", 3), ("_MOST_PROBS", 8)):
            patch.setattr(tapped_step, name, most)
        yield TinyEngine(replace(plan, buckets=make_buckets((8,), (32,), 8)))


def answers(
    core: EngineCore, *requests: EngineCoreRequest
) -> dict[str, tuple[list[int], dict[str, Tap]]]:
    tokens: dict[str, list[int]] = {item.request_id: [] for item in requests}
    read: dict[str, list[TapValue]] = {item.request_id: [] for item in requests}
    for item in requests:
        core.add_request(item)
    while core.has_work():
        step = core.step()
        check_integrity(core.scheduler)
        for name, token in zip(step.request_ids, step.token_ids, strict=True) if step else ():
            tokens[name].append(token)
        for event in step.events if step else ():
            assert event.error is None
            tokens[event.request_id] += event.new_token_ids
            read[event.request_id] += event.taps
    return {name: (tokens[name], taps_by_name(read[name])) for name in tokens}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.RandomState(100 * seed + length).randint(0, TINY.vocab_size, length).tolist()


def by_hand(
    engine: TinyEngine, tokens: Sequence[int], changed: Sequence[Intervention] = ()
) -> dict[str, np.ndarray]:
    weights = dict(zip(engine.model.names, map(np.asarray, engine.params), strict=True))
    return plain_forward(TINY, weights, tokens, changed)


def check(
    engine: TinyEngine,
    asked: EngineCoreRequest,
    answer: tuple[list[int], dict[str, Tap]],
    positions: Sequence[int] | None = None,
) -> None:
    """Tokens and all taps of a greedy request, at ``positions`` (None: all that are fed)."""
    tokens, taps = answer
    params = asked.sampling_params
    fed = [*asked.prompt_token_ids, *tokens[:-1]]
    want = by_hand(engine, fed, params.interventions or ())
    last = want[f"logits.{TINY.num_layers}"][len(asked.prompt_token_ids) - 1 :]
    assert tokens == last.argmax(-1).tolist()
    assert set(taps) == set(params.taps or ())
    for name, tap in taps.items():
        assert tap.positions == list(range(len(fed)) if positions is None else positions), name
        expected = want[name][tap.positions]
        if name.startswith("attn_probs"):
            expected = expected[:, :, : tap.values.shape[2]]
        assert tap.values.dtype == np.float32
        np.testing.assert_allclose(tap.values, expected, atol=CLOSE, rtol=CLOSE, err_msg=name)


def vector(seed: int, scale: float = 1.0) -> list[float]:
    return (np.random.RandomState(seed).randn(TINY.hidden_size) * scale).tolist()


CHANGES: tuple[tuple[Intervention, ...], ...] = (
    (),
    (Steer(1, vector(1)),),
    (Steer(0, vector(2), coefficient=-3.0, first=4),),
    (Steer(2, vector(3), first=10, last=41),),
    (AblateHead(0, 1), AblateHead(1, 3)),
    (Patch(1, 7, vector(4)), Patch(2, 8, vector(5))),
    (Patch(0, 3, vector(6)), Steer(0, vector(7)), AblateHead(0, 0)),
    tuple(Steer(i % 3, vector(8 + i), coefficient=0.5) for i in range(8)),
)


def test_taps_are_the_activations_of_the_model(tapped: TinyEngine) -> None:
    """Each step runs several times, and counts tokens for penalties once."""
    asked = request("a", prompt_of(45), 6, taps=ALL, tap_positions="all")
    check(tapped, asked, answers(tapped.core(), asked)["a"])
    penalty = {"frequency_penalty": 1.0, "allowed_token_ids": [5, 6, 7, 8]}  # often the same
    read: dict[str, object] = {"taps": ALL, "tap_positions": "all"}
    plain, tapping = (
        [request(str(i), prompt_of(20 + i), 30, **penalty, **more) for i in range(3)]
        for more in (dict[str, object](), read)
    )
    expected = answers(tapped.core(), *plain)
    found = answers(tapped.core(), *tapping)
    assert {name: tokens for name, (tokens, _) in found.items()} == {
        name: tokens for name, (tokens, _) in expected.items()
    }


@pytest.mark.parametrize(
    ("positions", "want"), [("last", [44]), ([0, -2, 20, 47, 20], [0, 20, 43, 47])]
)
def test_positions_are_chosen(
    tapped: TinyEngine, positions: str | list[int], want: list[int]
) -> None:
    asked = request("a", prompt_of(45), 6, taps=ALL, tap_positions=positions)
    check(tapped, asked, answers(tapped.core(), asked)["a"], want)


def test_requests_change_themselves_alone(tapped: TinyEngine) -> None:
    """Eight that change different things, at once and alone; the same text, so that whatever the
    cache had of one would be wrong for the others."""
    wishes = [
        request(str(i), prompt_of(40), 5, taps=["resid.2"], interventions=changed)
        for i, changed in enumerate(CHANGES)
    ]
    core = tapped.core()
    together = answers(core, *wishes)
    for wish in wishes:
        check(tapped, wish, together[wish.request_id], [39])
        alone = answers(tapped.core(), wish)[wish.request_id]
        assert together[wish.request_id][0] == alone[0]
        want = alone[1]["resid.2"].values
        np.testing.assert_allclose(together[wish.request_id][1]["resid.2"].values, want, atol=1e-4)
    assert len({tuple(tokens) for tokens, _ in together.values()}) > 4, "they change something"
    again = answers(core, *wishes)  # each finds its own blocks, and no others
    assert {name: tokens for name, (tokens, _) in again.items()} == {
        name: tokens for name, (tokens, _) in together.items()
    }
    assert core.stats().num_prefix_hits > 0


def test_a_row_that_is_used_again_is_not_changed(tapped: TinyEngine) -> None:
    core = tapped.core()
    asked = request("a", prompt_of(9), 4, interventions=CHANGES[7])
    assert answers(core, asked)["a"][0] != answers(tapped.core(), request("b", prompt_of(9), 4))
    for taps in ([], ["resid.1"]):
        plain = request("b", prompt_of(9), 4, taps=taps)
        check(tapped, plain, answers(core, plain)["b"], [8])


def test_what_is_tapped_is_computed_and_the_rest_found(tapped: TinyEngine) -> None:
    core = tapped.core()
    answers(core, request("first", prompt_of(60), 4))
    for positions, want, hits in (("all", None, 0), ("last", [59], 48), ([33, 59], [33, 59], 32)):
        before = core.stats().num_prefix_hits
        asked = request("a", prompt_of(60), 4, taps=ALL, tap_positions=positions)
        check(tapped, asked, answers(core, asked)["a"], want)
        found = core.stats().num_prefix_hits - before
        assert hits <= found <= hits + 15, "of the block after them, a part may be copied"


def test_preempted_requests_tell_every_tap_once(tapped: TinyEngine) -> None:
    """A pool that holds a third of what they grow to: taken back and computed again."""
    plan = replace(tapped.plan, num_blocks=10, host_blocks=0)
    runner = tapped.core(num_blocks=10, host_blocks=0)
    assert runner.scheduler.plan.num_blocks == plan.num_blocks
    wishes = [
        request(
            str(i),
            prompt_of(30, seed=i),
            40,
            taps=["resid.1", "attn_probs.1"],
            tap_positions="all",
            interventions=CHANGES[i],
        )
        for i in range(4)
    ]
    found = answers(runner, *wishes)
    assert runner.stats().num_preemptions > 0
    for wish in wishes:
        check(tapped, wish, found[wish.request_id])


def test_programs_without_taps_are_the_same_with_them(tapped: TinyEngine) -> None:
    plain = Programs(replace(tapped.plan, taps=False), tapped.model, BACKEND)

    def texts(programs: Programs) -> dict[str, str]:
        jobs = [programs._forward_job(bucket) for bucket in programs.plan.buckets]
        jobs += programs._fixed_jobs()
        return {
            job.name: jax.jit(job.function, donate_argnums=job.donated).lower(*job.args).as_text()
            for job in jobs
        }

    without, with_taps = texts(plain), texts(tapped.programs)
    assert set(with_taps) - set(without) == {"edit"}
    assert all(with_taps[name] == text for name, text in without.items())
    mixed = [bucket for bucket in tapped.plan.buckets if bucket.kind is BatchKind.MIXED]
    assert len(tapped.programs) == len(with_taps) + len(mixed) + 3  # and copy, save, load
