"""Which attention backend serves a model here, and why: the first of BACKENDS that does not
refuse.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from jaxllm.attention.backend import AttentionBackend, AttentionSpec, AttentionTarget
from jaxllm.errors import ConfigError
from jaxllm.registry import Registry
from pallas_kernels.attention.variant import CAUSAL

logger = logging.getLogger(__name__)

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
        _warn_of_variants(backend, specs, target)
        refusals.append(f"{name} refused: {', '.join(sorted(reasons))}")
    raise ConfigError("No attention backend can serve this model: " + "; ".join(refusals))


def widest_head_dim(head_dim: int) -> int:
    """The most channels that any backend gives a head in its KV pages, for a device that is not
    here."""
    return max(BACKENDS.load(name).cache_head_dim(head_dim) for name in BACKENDS.names())


def _warn_of_variants(
    backend: AttentionBackend, specs: Sequence[AttentionSpec], target: AttentionTarget
) -> None:
    """Whoever chose a variant may not know that it costs the whole model a faster backend."""
    lost: dict[str, str] = {}
    for spec in specs:
        reason = backend.refuses(spec, target)
        if reason is not None and backend.refuses(replace(spec, variant=CAUSAL), target) is None:
            lost.setdefault(spec.variant.name, reason)
    for name, reason in lost.items():
        logger.warning(
            "Attention variant %s is not served by %s, but by a slower backend: %s",
            name,
            backend.name,
            reason,
        )
