"""The only place that reads environment variables. All names are here."""

import math
import os
from pathlib import Path

CACHE_DIR = "JAXLLM_CACHE_DIR"
API_KEY = "JAXLLM_API_KEY"
_JAX_HOST_GIB = 64  # its own limit on locked memory


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


def prepare_accelerator(
    memory_fraction: float, *, preallocate: bool = True, host_gib: float = 0.0
) -> None:
    """Set what JAX reads at start-up; must run before JAX is first used. Values the user set are
    kept. With ``preallocate`` the share of memory is taken at once, otherwise as it is needed.
    ``host_gib``: of the host's memory that the engine itself will lock for copies, beside what JAX
    does.
    """
    limit = _JAX_HOST_GIB + math.ceil(host_gib)
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(limit))
    if not preallocate:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory_fraction:.4f}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")


def is_set(jax_setting: str) -> bool:
    """Whether the user has set one of JAX's own settings, which then holds."""
    return jax_setting.upper() in os.environ


def prepare_interpreter() -> None:
    """Give XLA's CPU client threads for kernels that are interpreted; must run before JAX is first
    used. There every warpgroup waits for the others in a thread of that client, which has one per
    core: on two cores a kernel of three warpgroups may wait for ever.
    """
    os.environ.setdefault("NPROC", "8")


def host_only_environment() -> dict[str, str]:
    """For a child process that must leave the accelerator alone."""
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
