"""The only place that reads environment variables. All names are here."""

import os
from pathlib import Path

CACHE_DIR = "JAXLLM_CACHE_DIR"
API_KEY = "JAXLLM_API_KEY"


def cache_dir() -> Path:
    """Where models and compiled programs are kept: $JAXLLM_CACHE_DIR, $XDG_CACHE_HOME/jaxllm or
    ~/.cache/jaxllm.
    """
    named = os.environ.get(CACHE_DIR)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxllm"


def api_keys() -> tuple[str, ...]:
    """Keys from $JAXLLM_API_KEY, separated by commas; empty when unset."""
    return tuple(key for key in os.environ.get(API_KEY, "").split(",") if key)


def prepare_accelerator(memory_fraction: float, *, preallocate: bool = True) -> None:
    """Set what JAX reads at start-up; must run before JAX is first used. Values the user set are
    kept. With ``preallocate`` the share of memory is taken at once, otherwise as it is needed.
    """
    if not preallocate:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory_fraction:.4f}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")


def host_only_environment() -> dict[str, str]:
    """For a child process that must leave the accelerator alone."""
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
