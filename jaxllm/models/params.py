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
from jaxllm.errors import ConfigError
from jaxllm.models import get_model
from jaxllm.models.decoder import DecoderLM
from jaxllm.parallel.cuts import Cut

Params = tuple[jax.Array, ...]


@dataclass(frozen=True)
class ModelDef:
    """A model without its numbers. ``names[i]`` is the dotted path of leaf i, ``specs[i]`` its
    shape on each device, and ``cuts[i]`` how it is shared out (None: every device has all of it).
    """

    config: ModelConfig
    names: tuple[str, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]
    cuts: tuple[Cut | None, ...]
    graphdef: Any
    treedef: Any

    def merge(self, leaves: Params) -> DecoderLM:
        """The callable model around these leaves; used inside traced code."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Of parameters that are cut in several pieces: how long they are on each device."""
        cuts = zip(self.names, self.cuts, strict=True)
        return {name: cut.pieces for name, cut in cuts if cut and len(cut.pieces) > 1}

    def flatten(self, params: Mapping[str, jax.Array]) -> Params:
        return tuple(params[name] for name in self.names)


def model_def(config: ModelConfig, dtype: str, platform: str = "cpu") -> ModelDef:
    """``platform``, as pallas_kernels names it: "sm_90" for Hopper; others take plain XLA.

    Raises:
        ConfigError: ``config`` is a part of a model whose layers do not say how they are cut.
    """
    cls = get_model(config.architecture)
    abstract = nnx.eval_shape(lambda: cls(config, dtype=jnp.dtype(dtype), platform=platform))
    graphdef, state = nnx.split(abstract)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(_name(path) for path, _ in leaves)
    specs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in leaves)
    if config.shards == 1:
        cuts: tuple[Cut | None, ...] = (None,) * len(names)
    else:
        cuts = _cuts(state)
        _check_cuts(config, names, specs, cuts)
    return ModelDef(config, names, specs, cuts, graphdef, treedef)


def _cuts(state: Any) -> tuple[Cut | None, ...]:
    params = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return tuple(param.get_metadata().get("cut") for param in params)


def _check_cuts(
    part: ModelConfig,
    names: tuple[str, ...],
    specs: tuple[jax.ShapeDtypeStruct, ...],
    cuts: tuple[Cut | None, ...],
) -> None:
    """Parameters that are smaller than the whole model's are those that say how they are cut: a
    layer that knows nothing of other devices would compute something else.
    """
    whole = param_spec(part.whole, "bfloat16")
    for name, spec, cut in zip(names, specs, cuts, strict=True):
        shape = list(spec.shape)
        if cut is not None:
            shape[cut.axis] *= part.shards
        if tuple(shape) != whole[name].shape:
            raise ConfigError(
                f"--tensor-parallel-size {part.shards}: the layer of {name} does not say how it is "
                "shared out. Make its products a ColumnLinear and a RowLinear "
                "(jaxllm/layers/linear.py), or use one device."
            )


def param_spec(config: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by dotted path."""
    model = model_def(config, dtype)
    return dict(zip(model.names, model.specs, strict=True))


def _name(path: tuple[Any, ...]) -> str:
    parts = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return ".".join(part for part in parts if part not in ("value", "raw_value", ".value"))
