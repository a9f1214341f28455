"""What times the kernels: the programs lower for Hopper, and a CPU times plain XLA and says so."""

from typing import Any

import jax
import pytest

from pallas_kernels.bench import ceilings, suite
from pallas_kernels.bench.kv_write import kv_write_error
from pallas_kernels.bench.timing import median_seconds
from pallas_kernels.kv_write.specs import SPECS
from pallas_kernels.kv_write.xla import rope_and_write_xla


@pytest.mark.parametrize("name", suite.OPERATIONS)
def test_the_timed_kernels_lower_for_hopper(name: str) -> None:
    operation = suite.OPERATIONS[name]

    def is_served(spec: Any) -> bool:
        return operation.refuses(spec, operation.default(spec), "sm_90") is None

    spec = min(filter(is_served, operation.small), key=operation.amount)
    config = operation.default(spec)
    timed = operation.timed(spec, config)
    lowered = jax.jit(timed.dispatch).trace().lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_a_cpu_times_plain_xla_and_says_why() -> None:
    found = ceilings.Ceilings(1e9, 1e9)
    case = next(case for case in suite.cases(["decode"]) if case.shape == "one full page")
    row = suite.measure(case, found)
    assert (row.path, row.config) == ("xla", None)
    assert row.refused == ("the decode kernel is built for sm_90, not cpu",)
    assert row.seconds and row.rate and row.of_ceiling
    assert row.rate == pytest.approx(case.spec.kv_bytes / row.seconds)
    assert row.of_ceiling == pytest.approx(row.rate / 1e9)


def test_what_nothing_serves_is_not_timed() -> None:
    shape = "only padding and decode"
    case = next(case for case in suite.cases(["prefill"]) if case.shape == shape)
    row = suite.measure(case, ceilings.Ceilings(1e9, 1e9))
    assert (row.path, row.seconds, row.failure) == ("none", None, None)
    assert row.refused[1] == "there is nothing to attend"


def test_a_failure_is_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no registers\nleft")

    monkeypatch.setattr(type(suite.OPERATIONS["sampling"]), "timed", fail)
    row = suite.measure(suite.cases(["sampling"])[0], ceilings.Ceilings(1e9, 1e9))
    assert row.failure == "RuntimeError: no registers left" and row.seconds is None


def test_ceilings_of_this_machine() -> None:
    found = ceilings.measure_ceilings()
    assert 1e8 < found.read_bytes_per_second < 1e14
    assert 1e8 < found.matmul_flops_per_second < 1e16


def test_the_check_of_kv_write_sees_wrong_answers_and_stray_writes() -> None:
    def stray(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, kv = rope_and_write_xla(*args)
        return q, kv.at[0].set(0)

    def swapped(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        qkv, cos, sin, *rest = args
        return rope_and_write_xla(qkv, sin, cos, *rest)

    spec = SPECS[3]
    assert kv_write_error(rope_and_write_xla, spec) is None
    assert "no token owns" in (kv_write_error(stray, spec) or "")
    assert "off" in (kv_write_error(swapped, spec) or "")


def test_the_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, dispatched = [0.0], []

    def dispatch() -> int:
        now[0] += 100.0 if not dispatched else 6.0  # the first compiles
        dispatched.append(1)
        return 0

    monkeypatch.setattr("pallas_kernels.bench.timing.time.perf_counter", lambda: now[0])
    assert median_seconds(dispatch, calls=3, queued=2, runs=5) == pytest.approx(2.0)
    assert len(dispatched) == 1 + 2 * 5
