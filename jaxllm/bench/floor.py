"""The least time of a decode step: the bytes it must read, at the rate that memory is read with.

A bound by memory alone. Where the rows are so many that arithmetic takes longer than reading the
weights (on an H200 from about 200 rows), no step comes near it.
"""

import gc
from dataclasses import dataclass
from importlib import import_module

from jaxllm.config.plan import EnginePlan

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class StepBytes:
    weights: float
    kv: float

    @property
    def total(self) -> float:
        return self.weights + self.kv


def decode_step_bytes(
    plan: EnginePlan, weight_bytes: int, batch_size: int, context: float
) -> StepBytes:
    """What a step of ``batch_size`` rows reads that see ``context`` tokens each, on average.

    All weights once, the language model's head included, but of the embedding table only a row per
    token, unless the table is the head too. Keys and values of the context, or of as much of it as
    a layer's window shows.
    """
    model, itemsize = plan.model, _ITEMSIZE[plan.dtype]
    table = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size * itemsize
    embedded = batch_size * model.hidden_size * itemsize
    windows = (model.window(layer) for layer in range(model.num_layers))
    seen = sum(context if window is None else min(context, window) for window in windows)
    channels = 2 * model.num_kv_heads * model.head_dim
    if model.latent is not None:
        channels = model.latent.kv_rank + model.latent.rope_dim
    per_token = channels * _ITEMSIZE[plan.page_dtype]
    return StepBytes(weight_bytes - table + embedded, batch_size * seen * per_token)


def measured_read_rate() -> float:
    """Bytes per second of the device, measured now. Call it when the engine has let go of its
    memory: it takes 4 GiB of an accelerator.
    """
    gc.collect()
    # By name: host code brings no JAX, but the LLM that was measured has started it.
    return import_module("pallas_kernels.bench.ceilings").read_bytes_per_second()
