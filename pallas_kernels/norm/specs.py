"""Shapes of residual add and RMS norm that tests, benchmarks and tuning share."""

from typing import NamedTuple


class NormSpec(NamedTuple):
    tokens: int
    width: int


WIDTHS = (
    576,  # SmolLM2 135M
    896,  # Qwen2.5 0.5B
    1024,  # Qwen3 0.6B
    2048,  # Llama 3.2 1B
    2560,  # Qwen3 4B
    3072,  # Llama 3.2 3B
    3584,  # Qwen2.5 7B
    4096,  # Llama 3.1 8B
    5120,  # Qwen3 14B
    8192,  # Llama 3.1 70B
)

# Speed: Llama 3.1 8B, from a decode step to a prefill step.
SPEED = tuple(NormSpec(tokens, 4096) for tokens in (1, 8, 64, 256, 2048, 8192))

# Few enough tokens for a CPU.
SMALL = tuple(NormSpec(2, width) for width in WIDTHS)
