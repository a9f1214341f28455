"""The log-probabilities that the engine gives, as a function that JAX differentiates.

One model for serving and for gradients: the same layers and the same attention variants, over whole
sequences instead of pages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.backends.dense import empty_page, whole_sequence
from jaxllm.config.engine import EngineConfig
from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.layers.rotary import rotary_table
from jaxllm.models.params import ModelDef, model_def
from jaxllm.parallel.mesh import BY_HEAD, WHOLE, DeviceMesh, param_specs
from jaxllm.worker.wiring import load_weights, open_model
from pallas_kernels.attention.variant import KINDS_BY_HEAD
from pallas_kernels.attention.variant_params import Params, param_arrays


class ScoreParams(NamedTuple):
    """All that can be learned; a pytree. With several devices the rows of a fused product are
    those of one device after those of another (``jaxllm/parallel``).
    """

    weights: dict[str, Array]  # by dotted path, in the model's dtype
    attention: tuple[Params, ...]  # of each layer: the float32 params of its variant, by name


@dataclass(frozen=True, eq=False)  # by identity, as jax.jit wants it of a function
class LogprobFn:
    """``fn(params, token_ids)``: pure, for ``jax.jit``, ``jax.grad`` and ``jax.vmap``. ``params``
    are those it was loaded with.
    """

    model: ModelDef  # what each device has of it
    params: ScoreParams
    devices: DeviceMesh

    def __call__(self, params: ScoreParams, token_ids: Int[Array, " T"]) -> Float[Array, " T1"]:
        """The log-probability of every token but the first after those before it, ``[T - 1]``
        float32: ``prompt_logprobs`` of the engine, to its dtype's rounding (figures in
        jaxllm/lab/README.md).
        """
        weights: Any = dict(zip(self.model.names, param_specs(self.model.cuts), strict=True))
        attention: Any = _attention_specs(self.model.config)
        given = (ScoreParams(weights, attention), WHOLE)
        return self.devices.spread(self._on_each, given, WHOLE)(params, token_ids)

    def _on_each(self, params: ScoreParams, token_ids: Int[Array, " T"]) -> Float[Array, " T1"]:
        config = self.model.config
        model = self.model.merge(self.model.flatten(params.weights))
        count = token_ids.shape[0]
        x, branch = model.embed(token_ids), None
        table = rotary_table(config.rope, jnp.arange(count, dtype=jnp.int32))
        for index, layer in enumerate(model.layers):
            spec = AttentionSpec.of(config, index)
            constants = param_arrays(spec.variant, spec.num_heads, 1, None)
            attend = whole_sequence(count, constants | params.attention[index])
            page = empty_page(spec, count, x.dtype)
            x, branch, *_ = layer(x, branch, page, table, attend)
        hidden = model.norm.add(x, branch)[0]
        logprobs = jax.nn.log_softmax(model.compute_logits(hidden[:-1]), axis=-1)
        return jnp.take_along_axis(logprobs, token_ids[1:, None], axis=-1)[:, 0]


def logprob_fn(
    model: str = "smollm2-135m", *, dtype: str = "float32", **settings: Any
) -> LogprobFn:
    """Load a model as ``LLM(model, dtype=dtype, **settings)`` would, without an engine.

    With ``tensor_parallel_size`` it is shared out as the engine is. Values of attention params that
    requests may bring are the defaults, and can be learned like all others. Plain XLA throughout,
    on any device: kernels have no gradients.

    Raises:
        ConfigError: as LLM.
    """
    config = EngineConfig(model=model, dtype=dtype, **settings)
    opened = open_model(config)
    definition = model_def(opened.model.config, opened.dtype)
    devices = DeviceMesh(config.tensor_parallel_size)
    loaded = load_weights(config, opened, devices)
    weights = dict(zip(definition.names, loaded, strict=True))
    specs, learnable = _attention_specs(definition.config), _learnable(definition.config)
    attention = tuple(map(devices.place, learnable, specs))
    return LogprobFn(definition, ScoreParams(weights, attention), devices)


def _learnable(config: ModelConfig) -> tuple[Params, ...]:
    """Of all heads, wherever they are."""
    whole, found = config.whole, list[Params]()
    for layer in range(whole.num_layers):
        spec = AttentionSpec.of(whole, layer)
        arrays = param_arrays(spec.variant, spec.num_heads, 1, None)
        found.append({n: a for n, a in arrays.items() if a.dtype == jnp.float32})
    return tuple(found)


def _attention_specs(config: ModelConfig) -> tuple[dict[str, PartitionSpec], ...]:
    """What of ``_learnable`` each device has."""
    variants = [AttentionSpec.of(config.whole, layer).variant for layer in range(config.num_layers)]
    return tuple(
        {
            param.name: BY_HEAD if param.kind in KINDS_BY_HEAD else WHOLE
            for param in variant.array_params
            if param.dtype == "float32"
        }
        for variant in variants
    )


def save_attention(fn: LogprobFn, params: ScoreParams, path: Path) -> None:
    """Write the attention params of all layers as a file for ``--attention``.

    Raises:
        ConfigError: the model's attention is its own, without variants, or the file cannot be
            written.
    """
    config = fn.model.config
    if not config.attention:
        raise ConfigError("This model has no attention variant whose values could be saved.")
    layers = [
        {"layer": choice.layer, "variant": choice.variant}
        | {"params": dict(choice.values) | _values(config, layer, learned)}
        for layer, (choice, learned) in enumerate(
            zip(config.attention, params.attention, strict=True)
        )
    ]
    try:
        path.write_text(json.dumps({"layers": layers}))
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.") from error


def _values(config: ModelConfig, layer: int, learned: Mapping[str, Array]) -> dict[str, Any]:
    kinds = {param.name: param.kind for param in AttentionSpec.of(config, layer).variant.params}
    arrays = {name: np.asarray(value) for name, value in learned.items()}
    return {n: (a[0] if kinds[n] == "per_row" else a).tolist() for n, a in arrays.items()}
