"""What the user asked for. Field names are vLLM's flags; ``help`` metadata becomes ``--help``.

Nothing here is ever changed after construction: what was decided from it is an EnginePlan.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from jaxllm.errors import ConfigError


def flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine, as given on the command line or to ``LLM(...)``."""

    model: str = flag("smollm2-135m", "local directory, GGUF file, Hub repository, or smollm2-135m")
    tokenizer: str | None = flag(None, "directory with tokenizer.json; default: the model's own")
    revision: str | None = flag(None, "branch, tag or commit on the Hub")
    dtype: str = flag(
        "auto", "weights and activations", choices=("auto", "bfloat16", "float16", "float32")
    )
    load_format: str = flag(
        "auto", "dummy: random weights from config.json alone", choices=("auto", "dummy")
    )
    max_model_len: int | None = flag(
        None, "longest prompt + output; default: what the model allows"
    )
    seed: int = flag(0, "seeds dummy weights and the requests that bring no seed")
    attention: str | None = flag(
        None, "variant: a name, FILE.py:NAME, or FILE.json with one per layer; default: the model's"
    )
    attention_params: str | None = flag(None, "JSON file with values for the variant's params")
    block_size: int = flag(64, "tokens per KV-cache block")
    gpu_memory_utilization: float = flag(0.92, "share of the accelerator's memory to use")
    kv_cache_memory_bytes: int | None = flag(None, "size of the KV cache; default: measured")
    num_gpu_blocks_override: int | None = flag(None, "number of KV-cache blocks; default: measured")
    max_num_seqs: int | None = flag(None, "requests that run at once; default by device")
    max_num_batched_tokens: int | None = flag(None, "tokens per step; default by device")
    enable_embeddings: bool = flag(
        False, "serve /v1/embeddings too: the last token's final hidden state, normalised"
    )
    async_scheduling: bool = flag(True, "schedule one step ahead of the device")
    step_timeout: float = flag(
        60.0, "an engine process without progress for so many seconds is replaced; starting is free"
    )
    compilation_cache_dir: str | None = flag(None, "where compiled programs are kept")
    offline: bool = flag(False, "never reach for the Hub or a package registry")
    allowed_model_sources: tuple[str, ...] = flag(
        (), "directories and owners on the Hub that models may come from; default: any"
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("The model's name is empty: name one, or leave it out.")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"--{item.name.replace('_', '-')} is too large: {value}.")
        at_least_one = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
        for name in (*at_least_one, "kv_cache_memory_bytes", "num_gpu_blocks_override"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}."
            )
        if not 0.0 < self.step_timeout < float("inf"):  # NaN is refused too
            raise ConfigError(f"--step-timeout must be more than 0, got {self.step_timeout}.")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size must be a power of two, got {self.block_size}.")
        for item in fields(self):
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                raise ConfigError(
                    f"--{item.name.replace('_', '-')} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, item.name)!r}."
                )
