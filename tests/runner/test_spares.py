"""Results are written over those of earlier steps, so that arrays stay where they are."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.runner.lowering_cache import overwriting
from jaxllm.runner.spares import MOST_KEPT, Program, Spares
from tests.fakes.tiny_engine import TinyEngine, request

SPEC = jax.ShapeDtypeStruct((4,), jnp.float32)


def test_results_lie_where_what_they_overwrite_lay() -> None:
    """Two of one shape and dtype as the argument updated in place is, which keeps its own place."""

    def function(kept: jax.Array, given: jax.Array) -> tuple[jax.Array, ...]:
        return kept + given, given * 2, jnp.flip(given)

    lowered = overwriting(function, (SPEC, SPEC), (0,), (SPEC, SPEC))
    program = Program("twice", lowered.compile(), (SPEC, SPEC))
    arrays = [jnp.full(4, value) for value in (1.0, 5.0, 6.0)]
    given = jnp.arange(4, dtype=jnp.float32)
    places = [array.unsafe_buffer_pointer() for array in arrays]
    spares = Spares()
    spares.give("twice", tuple(arrays[1:]))
    results = spares.run(program, arrays[0], given)
    assert [result.unsafe_buffer_pointer() for result in results] == places
    assert [np.asarray(r).tolist() for r in results] == [[1, 2, 3, 4], [0, 2, 4, 6], [3, 2, 1, 0]]
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(arrays[1])


def test_without_spares_there_are_new_arrays_and_few_are_kept() -> None:
    lowered = overwriting(lambda given: (given, given + 1), (SPEC,), (), (SPEC,) * 2)
    program, spares = Program("one", lowered.compile(), (SPEC,) * 2), Spares()
    results = [spares.run(program, jnp.zeros(4)) for _ in range(MOST_KEPT + 1)]
    assert all(np.asarray(one).tolist() == [1] * 4 for _, one in results)
    for result in results:
        spares.give("one", result)
    assert not results[-1][0].is_deleted()
    for _ in results:
        spares.run(program, jnp.zeros(4))
    assert [result[0].is_deleted() for result in results] == [True] * MOST_KEPT + [False]


def test_steps_find_their_arrays_where_the_last_had_them(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine.runner()
    runner.warm_up()
    places: dict[tuple[int, ...], set[int]] = defaultdict(set)
    forward = runner._forward

    def noted(*given: Any) -> Any:
        logits, *others = forward(*given)
        places[logits.shape].add(logits.unsafe_buffer_pointer())
        return logits, *others

    monkeypatch.setattr(runner, "_forward", noted)
    core = EngineCore(Scheduler(engine.plan), runner)
    engine.run([request("a", [5, 6, 7], 30), request("b", [8] * 20, 30)], core)
    assert places and {len(found) for found in places.values()} == {1}
