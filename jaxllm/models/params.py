"""Between a Flax NNX model and the flat tuple of arrays that jitted programs take.

A model is split once: the structure stays in Python, the leaves go through ``jax.jit``. Passing an
nnx State instead costs milliseconds of host time in every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config.model import ModelConfig
from jaxllm.models import get_model
from jaxllm.models.decoder import DecoderLM

Params = tuple[jax.Array, ...]


@dataclass(frozen=True)
class ModelDef:
    """A model without its numbers. ``names[i]`` is the dotted path of leaf i."""

    config: ModelConfig
    names: tuple[str, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]
    graphdef: Any
    treedef: Any

    def merge(self, leaves: Params) -> DecoderLM:
        """The callable model around these leaves; used inside traced code."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def flatten(self, params: Mapping[str, jax.Array]) -> Params:
        return tuple(params[name] for name in self.names)


def model_def(config: ModelConfig, dtype: str, platform: str = "cpu") -> ModelDef:
    """``platform``, as pallas_kernels names it: "sm_90" for Hopper; others take plain XLA."""
    cls = get_model(config.architecture)
    abstract = nnx.eval_shape(lambda: cls(config, dtype=jnp.dtype(dtype), platform=platform))
    graphdef, state = nnx.split(abstract)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(_name(path) for path, _ in leaves)
    specs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in leaves)
    return ModelDef(config, names, specs, graphdef, treedef)


def param_spec(config: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by dotted path."""
    model = model_def(config, dtype)
    return dict(zip(model.names, model.specs, strict=True))


def _name(path: tuple[Any, ...]) -> str:
    parts = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return ".".join(part for part in parts if part not in ("value", "raw_value", ".value"))
