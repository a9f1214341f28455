"""Shapes of sampling that tests, benchmarks and tuning share."""

from typing import NamedTuple


class SampleSpec(NamedTuple):
    rows: int
    vocab: int


SPECS = (
    SampleSpec(1, 128256),  # Llama 3.1
    SampleSpec(8, 128256),
    SampleSpec(64, 128256),
    SampleSpec(256, 128256),
    SampleSpec(64, 151936),  # Qwen 2.5 and 3
    SampleSpec(64, 49152),  # SmolLM2
    SampleSpec(64, 32000),  # Llama 2
)

SPEED = SPECS

# Few enough logits for a CPU; the first is no multiple of a tile.
SMALL = (SampleSpec(2, 5004), SampleSpec(8, 32000))
