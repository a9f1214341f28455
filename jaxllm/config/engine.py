"""What the user asked for. Field names are vLLM's flags; ``help`` metadata becomes ``--help``.

Nothing here is ever changed after construction: what was decided from it is an EnginePlan.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from jaxllm.config.plan import KV_CACHE_DTYPES
from jaxllm.config.scheduling import POLICY_NAMES, SchedulingConfig
from jaxllm.errors import ConfigError


def flag(default: Any, help: str, *, secret: bool = False, **metadata: Any) -> Any:
    """A field that is a flag. ``choices``: its values; ``flag``: its name where that is another."""
    return field(default=default, repr=not secret, metadata={"help": help, **metadata})


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
    generation_config: str = flag(
        "auto",
        "sampling where requests leave it open; auto: as the model's generation_config.json "
        "recommends; none, or vllm: always by the same defaults",
        choices=("auto", "none", "vllm"),
    )
    max_model_len: int | None = flag(
        None, "longest prompt + output; default: what the model allows"
    )
    seed: int = flag(0, "seeds dummy weights and the requests that bring no seed")
    attention: str | None = flag(
        None, "variant: a name, FILE.py:NAME, or FILE.json with one per layer; default: the model's"
    )
    attention_params: str | None = flag(None, "JSON file with values for the variant's params")
    tensor_parallel_size: int = flag(
        1, "devices of this host that share the model out: heads, inner channels, vocabulary"
    )
    block_size: int = flag(64, "tokens per KV-cache block")
    gpu_memory_utilization: float = flag(0.92, "share of the accelerator's memory to use")
    kv_cache_memory_bytes: int | None = flag(None, "size of the KV cache; default: measured")
    kv_cache_dtype: str = flag(
        "auto",
        "of cached keys and values; fp8: e4m3, not scaled, room for twice the tokens; "
        "auto: as activations",
        choices=KV_CACHE_DTYPES,
    )
    num_gpu_blocks_override: int | None = flag(None, "number of KV-cache blocks; default: measured")
    max_num_seqs: int | None = flag(None, "requests that run at once; default by device")
    max_num_batched_tokens: int | None = flag(None, "tokens per step; default by device")
    scheduling_policy: str = flag(
        "fcfs", "which waiting request runs next; fair: between API keys", choices=POLICY_NAMES
    )
    tenant_weights: tuple[str, ...] = flag(
        (), "with fair: TENANT=WEIGHT, 1 where none is named; TENANT as in the access log"
    )
    long_prefill_token_threshold: int | None = flag(
        None, "longer prefills leave half a step to shorter ones; default: a quarter of a step"
    )
    target_itl_ms: float | None = flag(
        None, "milliseconds between a request's tokens: prefills fill what this leaves of a step"
    )
    enable_embeddings: bool = flag(
        False, "serve /v1/embeddings too: the last token's final hidden state, normalised"
    )
    taps: bool = flag(
        False, "let requests read and change activations: taps and interventions (jaxllm/taps)"
    )
    enable_prefix_caching: bool = flag(
        True, "keep computed blocks while there is room, and share them among requests"
    )
    jump_forward: bool = flag(
        True, "feed text that a grammar leaves no choice about in one step, not token by token"
    )
    prefix_cache_scope: str = flag(
        "key",
        "who shares cached blocks: requests of one API key, or all; how fast an answer comes tells "
        "whether others have asked the like",
        choices=("key", "all"),
    )
    swap_space: float | None = flag(
        None,
        "GiB of the host's memory for the KV blocks of preempted requests; default: 4 on an "
        "accelerator where loading them is faster than computing them again, if the host has 16 "
        "times as much, else 0",
    )
    kv_offloading_size: float = flag(
        0.0, "GiB of the host's memory, beside --swap-space, for any KV block that must make way"
    )
    kv_offloading_dir: str | None = flag(
        None,
        "directory for files of KV blocks that leave the device, found again after a restart: they "
        "tell what was asked, so mode 0700; one engine at a time",
    )
    kv_offloading_dir_size: float = flag(16.0, "GiB that these files may take; the oldest make way")
    kv_offloading_dir_timeout: float = flag(
        5.0, "seconds in which a clean end writes the blocks that are on the device alone; 0: none"
    )
    async_scheduling: bool = flag(True, "schedule one step ahead of the device")
    step_timeout: float = flag(
        60.0, "an engine process without progress for so many seconds is replaced; starting is free"
    )
    journal: str | None = flag(
        None, "record requests and decisions there for jaxllm replay; holds prompts: mode 0600"
    )
    journal_max_bytes: int = flag(2**30, "size at which the journal ends; the engine runs on")
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
        at_least_one += ("kv_cache_memory_bytes", "num_gpu_blocks_override", "journal_max_bytes")
        at_least_one += ("tensor_parallel_size",)
        for name in (*at_least_one, "long_prefill_token_threshold"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.tensor_parallel_size > 1 and self.taps:
            raise ConfigError(
                "--taps reads and changes all heads in one place, which "
                "--tensor-parallel-size shares out: leave out one of the two."
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}."
            )
        for name in ("swap_space", "kv_offloading_size", "kv_offloading_dir_size"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 2**20:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be GiB, at least 0, got {value}."
                )
        for name in ("swap_space", "kv_offloading_size", "kv_offloading_dir"):
            if getattr(self, name) and not self.enable_prefix_caching:
                raise ConfigError(
                    f"--{name.replace('_', '-')} keeps blocks by the prefix cache, which "
                    "--no-enable-prefix-caching turns off: leave out one of the two."
                )
        if self.kv_offloading_dir is not None and not self.kv_offloading_dir_size:
            raise ConfigError("--kv-offloading-dir-size must be more than 0 GiB.")
        if not 0.0 <= self.kv_offloading_dir_timeout < float("inf"):
            raise ConfigError("--kv-offloading-dir-timeout must be seconds, at least 0.")
        if not 0.0 < self.step_timeout < float("inf"):  # NaN is refused too
            raise ConfigError(f"--step-timeout must be more than 0, got {self.step_timeout}.")
        if self.target_itl_ms is not None and not 0.0 < self.target_itl_ms < float("inf"):
            raise ConfigError(f"--target-itl-ms must be more than 0, got {self.target_itl_ms}.")
        if self.scheduling.weight_by_tenant() and self.scheduling_policy != "fair":
            raise ConfigError("Weights of tenants are for --scheduling-policy fair only.")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size must be a power of two, got {self.block_size}.")
        for item in fields(self):
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                raise ConfigError(
                    f"--{item.name.replace('_', '-')} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, item.name)!r}."
                )

    @property
    def scheduling(self) -> SchedulingConfig:
        return SchedulingConfig(
            policy=self.scheduling_policy,
            tenant_weights=self.tenant_weights,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
        )
