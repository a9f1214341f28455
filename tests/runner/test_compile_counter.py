from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.messages import Compilations
from jaxllm.runner.compile_counter import CompileCounter, compile_counter


@pytest.fixture
def cache(tmp_path: Path):
    """A compilation cache of this test's own."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (True, str(tmp_path), 0.0, -1), strict=True):
        jax.config.update(name, value)
    jax.clear_caches()
    compilation_cache().reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache().reset_cache()


def compilation_cache():
    from jax.experimental.compilation_cache import compilation_cache

    return compilation_cache


def since(before: Compilations, counter: CompileCounter) -> tuple[int, int, int]:
    now = counter()
    return (
        now.num_compiled - before.num_compiled,
        now.num_cache_hits - before.num_cache_hits,
        now.num_cache_misses - before.num_cache_misses,
    )


@pytest.mark.usefixtures("cache")
def test_compiled_once_then_found() -> None:
    counter = compile_counter()
    argument = jax.ShapeDtypeStruct((3,), jnp.float32)
    before = counter()
    jax.jit(lambda x: x * 3).lower(argument).compile()
    assert since(before, counter) == (1, 0, 1)
    jax.clear_caches()
    before = counter()
    jax.jit(lambda x: x * 3).lower(argument).compile()
    assert since(before, counter) == (0, 1, 0)


def test_calls_of_what_is_compiled_do_not_count() -> None:
    counter = compile_counter()
    compiled = jax.jit(lambda x: x + 5).lower(jax.ShapeDtypeStruct((2,), jnp.float32)).compile()
    value = jnp.ones(2, jnp.float32)
    before = counter()
    compiled(value)
    assert since(before, counter) == (0, 0, 0)


def test_there_is_one_per_process() -> None:
    assert compile_counter() is compile_counter()
