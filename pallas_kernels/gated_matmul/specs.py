"""Shapes of the gated product that tests, benchmarks and tuning share."""

from typing import NamedTuple


class GatedSpec(NamedTuple):
    tokens: int
    width: int
    inner: int


# Few enough for the interpreter.
SMALL = (GatedSpec(256, 192, 256), GatedSpec(128, 64, 384))

MODELS = (
    GatedSpec(1024, 4096, 14336),  # Llama 3.1 8B
    GatedSpec(1024, 3072, 8192),  # Llama 3.2 3B
    GatedSpec(1024, 2048, 8192),  # Llama 3.2 1B
    GatedSpec(1024, 1024, 3072),  # Qwen3 0.6B
    GatedSpec(1024, 576, 1536),  # SmolLM2 135M
)

# Speed: Llama 3.1 8B, from a decode step to a prefill step.
SPEED = tuple(GatedSpec(tokens, 4096, 14336) for tokens in (256, 512, 1024, 2048, 4096, 8192))
