"""Which attention backend serves a model here, and why: the first of BACKENDS that does not
refuse.
"""

from collections.abc import Sequence

from jaxllm.attention.backend import AttentionBackend, AttentionSpec, AttentionTarget
from jaxllm.errors import ConfigError
from jaxllm.registry import Registry

# In order of preference. The XLA backend takes everything, so it comes last.
BACKENDS: Registry[AttentionBackend] = Registry(
    "attention backend",
    {
        "pallas": "jaxllm.attention.backends.pallas:BACKEND",
        "xla": "jaxllm.attention.backends.xla:BACKEND",
    },
)


def select_backend(
    specs: Sequence[AttentionSpec], target: AttentionTarget
) -> tuple[AttentionBackend, str]:
    """Returns the backend and the reason for the choice, for the log."""
    refusals: list[str] = []
    for name in BACKENDS.names():
        backend = BACKENDS.load(name).on(target)
        reasons = {reason for spec in specs if (reason := backend.refuses(spec, target))}
        if not reasons:
            return backend, "; ".join([f"{name} on {target.platform}", *refusals])
        refusals.append(f"{name} refused: {', '.join(sorted(reasons))}")
    raise ConfigError("No attention backend can serve this model: " + "; ".join(refusals))


def widest_head_dim(head_dim: int) -> int:
    """The most channels that any backend gives a head in its KV pages, for a device that is not
    here."""
    return max(BACKENDS.load(name).cache_head_dim(head_dim) for name in BACKENDS.names())
