"""From checkpoint tensors to parameters on the host: checks first, then one parameter at a time.

Knows rules, shapes and numpy. No JAX: ``spec`` needs only ``.shape`` and ``.dtype``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.weights.mapping import WeightRule
from jaxllm.weights.sources import TensorSource

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
SHOWN = 5  # problems named in one message


class ArraySpec(Protocol):
    """Shape and dtype of a parameter; jax.ShapeDtypeStruct is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


Spec = Mapping[str, ArraySpec]


class Assembly:
    """Parameters of ``spec`` out of ``source`` by ``rules``.

    The constructor reads headers only and raises CheckpointError, naming the first few of
    everything that is missing, unexpected, or of a wrong shape or dtype. ``ignore`` holds
    beginnings and ends of tensor names that may be left over.
    """

    def __init__(
        self,
        spec: Spec,
        rules: Sequence[WeightRule],
        source: TensorSource,
        ignore: Sequence[str] = (),
    ):
        self.spec = spec
        self._source = source
        self._rules = {rule.target: rule for rule in rules}
        problems = self._rule_problems(rules)
        present = set(source.names())
        used = {name for rule in rules for name in rule.sources}
        problems += [f"missing tensor {name!r}" for name in sorted(used - present)]
        for rule in rules:
            if rule.target in spec and present.issuperset(rule.sources):
                problems += self._tensor_problems(rule)
        problems += [
            f"unexpected tensor {name!r} of shape {source.info(name).shape}"
            for name in sorted(present - used)
            if not name.startswith(tuple(ignore)) and not name.endswith(tuple(ignore))
        ]
        if problems:
            more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
            raise CheckpointError(
                "The checkpoint does not fit the model: " + "; ".join(problems[:SHOWN]) + more
            )

    def _rule_problems(self, rules: Sequence[WeightRule]) -> list[str]:
        problems = [
            f"no rule makes parameter {name!r}" for name in self.spec if name not in self._rules
        ]
        problems += [
            f"a rule makes the unknown parameter {name!r}"
            for name in self._rules
            if name not in self.spec
        ]
        if len(self._rules) != len(rules):
            problems.append("two rules make the same parameter")
        return problems

    def _tensor_problems(self, rule: WeightRule) -> list[str]:
        infos = [self._source.info(name) for name in rule.sources]
        problems = [
            f"tensor {name!r} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            for name, info in zip(rule.sources, infos, strict=True)
            if info.dtype not in FLOAT_DTYPES
        ]
        expected = tuple(self.spec[rule.target].shape)
        found = _result_shape(rule, [info.shape for info in infos])
        if found != expected:
            shapes = " + ".join(
                f"{n!r} {i.shape}" for n, i in zip(rule.sources, infos, strict=True)
            )
            problems.append(f"{shapes} cannot make {rule.target!r} of shape {expected}")
        return problems

    @property
    def total_bytes(self) -> int:
        return sum(nbytes(spec) for spec in self.spec.values())

    def read(self, target: str) -> np.ndarray:
        """One parameter as a fresh array of its spec's shape and dtype."""
        rule, dtype = self._rules[target], np.dtype(self.spec[target].dtype)
        result = np.empty(self.spec[target].shape, dtype)
        start = 0
        for name in rule.sources:
            tensor = self._source.read(name)
            if rule.split is not None:
                part, of = rule.split
                tensor = np.split(tensor, of, axis=rule.axis)[part]
            index = [slice(None)] * result.ndim
            index[rule.axis] = slice(start, start := start + tensor.shape[rule.axis])
            with np.errstate(over="ignore"):
                result[tuple(index)] = tensor
            _check_range(tensor, result[tuple(index)], name)
        return result


def nbytes(spec: ArraySpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _check_range(tensor: np.ndarray, cast: np.ndarray, name: str) -> None:
    """float16 ends at 65504; a larger weight would become inf without a word."""
    narrowed = cast.dtype == np.float16 and tensor.dtype != np.float16
    if narrowed and not np.isfinite(cast).all():
        raise CheckpointError(f"tensor {name!r} does not fit into float16; use dtype bfloat16")


def _result_shape(rule: WeightRule, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape after concatenation or split; None where the rule cannot apply."""
    first = shapes[0]
    if rule.axis >= len(first) or any(len(shape) != len(first) for shape in shapes):
        return None
    others = {shape[: rule.axis] + shape[rule.axis + 1 :] for shape in shapes}
    if len(others) != 1 or (rule.split is not None and len(shapes) != 1):
        return None
    length = sum(shape[rule.axis] for shape in shapes)
    if rule.split is not None:
        part, of = rule.split
        if not 0 <= part < of or length % of:
            return None
        length //= of
    return (*first[: rule.axis], length, *first[rule.axis + 1 :])


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name out of FLOAT_DTYPES. Raises CheckpointError."""
    if name not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype {name!r} is not supported; use {', '.join(FLOAT_DTYPES)}")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
