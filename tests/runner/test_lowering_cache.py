"""Lowered programs on disk: found again only by the same program, and never trusted blindly."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.runner import lowering_cache
from jaxllm.runner.lowering_cache import LoweringCache, is_ours
from jaxllm.runner.programs import Programs
from tests.fakes.tiny_engine import TinyEngine, request
from tests.runner.test_lowering_helpers import CPU, SlowCaller

ARGS = (jax.ShapeDtypeStruct((4,), jnp.float32),)


class Counted:
    """A function that knows how often it was traced."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(self, x: jax.Array, *, factor: float = 2.0) -> jax.Array:
        self.traces += 1
        return x * factor


def test_a_second_start_does_not_trace(tmp_path: Path) -> None:
    for traces in (1, 0):
        function = Counted()
        lowered, _ = LoweringCache(tmp_path, "plan").lower("twice", function, ARGS, (0,))
        assert function.traces == traces
        out = lowered.compile()(jnp.arange(4, dtype=jnp.float32))
        assert np.asarray(out).tolist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("name", "shaped_by", "length"),
    [("other", "plan", 4), ("twice", "other plan", 4), ("twice", "plan", 5)],
)
def test_another_program_is_lowered_anew(
    tmp_path: Path, name: str, shaped_by: str, length: int
) -> None:
    LoweringCache(tmp_path, "plan").lower("twice", Counted(), ARGS, ())
    function = Counted()
    args = (jax.ShapeDtypeStruct((length,), jnp.float32),)
    LoweringCache(tmp_path, shaped_by).lower(name, function, args, ())
    assert function.traces == 1


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_costs_time_only(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    LoweringCache(tmp_path).lower("twice", Counted(), ARGS, ())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    function = Counted()
    LoweringCache(tmp_path).lower("twice", function, ARGS, ())
    assert function.traces == 1 and "anew" in caplog.text
    LoweringCache(tmp_path).lower("twice", function, ARGS, ())
    assert function.traces == 1  # it was written whole again


def test_a_directory_that_cannot_be_written_is_only_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    LoweringCache(tmp_path / "file").lower("twice", Counted(), ARGS, ())
    assert "Cannot keep" in caplog.text


@pytest.mark.parametrize("bound", ["MAX_BYTES", "MAX_FILES"])
def test_what_was_of_no_use_for_longest_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    def lower(name: str) -> int:
        function = Counted()
        LoweringCache(tmp_path).lower(name, function, ARGS, ())
        for path in tmp_path.iterdir():  # as if it were long ago
            status = path.stat()
            os.utime(path, (status.st_atime, status.st_mtime - 1000))
        return function.traces

    assert lower("one") == lower("two") == 1
    torn = tmp_path / "three.jaxexport.tmp-1"
    torn.write_bytes(b"half a file")
    os.utime(torn, (0, 0))
    (tmp_path / "notes").write_text("not ours")
    sizes = [path.stat().st_size for path in tmp_path.glob("*.jaxexport")]
    room = {"MAX_BYTES": max(sizes) * 5 // 2, "MAX_FILES": 2}
    monkeypatch.setattr(lowering_cache, bound, room[bound])
    assert lower("one") == 0  # of use just now
    assert lower("three") == 1
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"one", "three", "notes"}
    assert lower("one") == 0 and lower("two") == 1


def test_only_what_our_source_covers_is_kept() -> None:
    assert is_ours(type(BACKEND), LlamaForCausalLM)
    assert not is_ours(type(BACKEND), Counted)


def test_what_cannot_be_kept_is_lowered_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("a custom call of another name")

    monkeypatch.setattr(jax.export, "export", refuse)
    lowered, _ = LoweringCache(tmp_path).lower("twice", Counted(), ARGS, ())
    assert np.asarray(lowered.compile()(jnp.ones(4, jnp.float32))).tolist() == [2.0] * 4
    assert "at every start" in caplog.text and not list(tmp_path.iterdir())


def test_an_engine_of_kept_programs_answers_the_same(
    engine: TinyEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lowered here and by a helper, and then found."""
    requests = [
        request("a", [5, 6, 7], 6, logprobs=2, presence_penalty=1.0),
        request("b", [8] * 20, 6, temperature=1.0, seed=3),
        request("c", [9, 1], 3, prompt_logprobs=1),
    ]
    expected = engine.run(requests)
    ends = replace(engine.plan.model, eos_token_ids=(3,))
    on_the_host = replace(engine.plan, model=ends, prefix_caching=not engine.plan.prefix_caching)
    for plan, helpers in ((engine.plan, SlowCaller(CPU, 1)), (on_the_host, None)):
        again = TinyEngine.__new__(TinyEngine)
        again.plan, again.model, again.params = plan, engine.model, engine.params
        draft = replace(plan, num_blocks=99)
        again.programs = Programs(draft, engine.model, BACKEND, tmp_path, helpers)
        again.programs.settle(plan)
        again.programs.compile(threads=2, progress=False)
        assert helpers is None or all(helpers.helped.values())
        assert again.run(requests) == expected
    assert not caplog.records
    assert len(list(tmp_path.iterdir())) == len(engine.programs)
