"""jaxllm: an LLM serving engine in JAX.

Importing this package does not import JAX: the public names load on first use, so that the
HTTP process and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.async_llm import AsyncLLM as AsyncLLM
    from jaxllm.config.engine import EngineConfig as EngineConfig
    from jaxllm.grammar.structured_outputs import (
        StructuredOutputsParams as StructuredOutputsParams,
    )
    from jaxllm.llm import LLM as LLM
    from jaxllm.outputs import CompletionOutput as CompletionOutput
    from jaxllm.outputs import RequestOutput as RequestOutput
    from jaxllm.sampling_params import BeamSearchParams as BeamSearchParams
    from jaxllm.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "jaxllm.llm",
    "AsyncLLM": "jaxllm.async_llm",
    "EngineConfig": "jaxllm.config.engine",
    "BeamSearchParams": "jaxllm.sampling_params",
    "SamplingParams": "jaxllm.sampling_params",
    "StructuredOutputsParams": "jaxllm.grammar.structured_outputs",
    "RequestOutput": "jaxllm.outputs",
    "CompletionOutput": "jaxllm.outputs",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
