"""Counts what XLA compiles in this process, whoever asked for it: nothing should after the start.

JAX tells it through ``jax.monitoring``; the names of the events are not documented, so a test keeps
them.
"""

import threading
from functools import cache

import jax.monitoring

from jaxllm.messages import Compilations

_COMPILED = "/jax/core/compile/backend_compile_duration"  # found in the cache, too
_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


class CompileCounter:
    """Counts from its making on; called, it tells. ``compile_counter`` makes the only one."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys((_COMPILED, _HIT, _MISS), 0)
        self._lock = threading.Lock()  # programs are compiled by several threads
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def __call__(self) -> Compilations:
        with self._lock:
            hits = self._counts[_HIT]
            return Compilations(self._counts[_COMPILED] - hits, hits, self._counts[_MISS])

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self._on_event(event)

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event in self._counts:
            with self._lock:
                self._counts[event] += 1


@cache
def compile_counter() -> CompileCounter:
    """The process's own: JAX keeps its listeners for good."""
    return CompileCounter()
