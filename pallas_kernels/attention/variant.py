"""What an attention variant is: plain JAX functions of positions, and the numbers they need.

A variant is causal attention with its logits changed (``score_mod``), positions hidden
(``mask_mod``), and pages left out because nothing in them is visible (``kv_range``). The functions
are traced into whatever serves: the float32 reference, plain XLA, the Hopper kernels. There they
see tiles, so they may only compute element by element; what comes from outside is a ``Param``.
After FlexAttention (Dong et al. 2024, arXiv:2412.05496), over logical positions instead of pages.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

Kind = Literal["per_head", "per_layer", "per_row", "per_distance", "per_token"]
DType = Literal["float32", "int32"]
# A number for all entries, nested tuples of the whole shape, or a function from the number of query
# heads to either.
Default = Any
_KINDS: tuple[Kind, ...] = ("per_head", "per_layer", "per_row", "per_distance", "per_token")
KINDS_BY_HEAD: tuple[Kind, ...] = ("per_head", "per_distance")  # arrays [H, ...]
MAX_PER_TOKEN = 2  # of a variant: each takes 4 bytes per token and KV head, beside its keys
_MAX_SIZE = {"per_row": 64, "per_distance": 2**14}


class VariantError(ValueError):
    """A declaration, a function or a value that no backend could serve; says what to do."""


@dataclass(frozen=True)
class Param:
    """Numbers that a variant's functions get as ``params.NAME``.

    - per_head [H]: the head's number.
    - per_layer []: one number; layers may differ by their values.
    - per_row [] or [size]: what a request brings; with ``size`` a tuple of so many numbers.
    - per_distance [H, size]: the number at distance ``q_pos - kv_pos``; a table's last entry is for
      all larger distances, its first for those below zero.
    - per_token [], of every token and KV head: what a layer computes of a token, or a request
      brings for the tokens of its prompt, kept in pages beside the keys. Functions get a pair,
      the query's and the key's: ``params.NAME.query``, ``params.NAME.key``.
    """

    name: str
    kind: Kind
    default: Default = 0.0
    size: int | None = None
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise VariantError(f"{self.name!r} is no name for a param: use an identifier")
        if self.kind not in _KINDS:
            raise VariantError(f"param {self.name}: kind must be one of {_KINDS}, not {self.kind}")
        if self.dtype not in ("float32", "int32"):
            raise VariantError(f"param {self.name}: dtype must be float32 or int32")
        if self.kind == "per_token" and self.dtype != "float32":
            raise VariantError(f"param {self.name}: per_token takes float32 only")
        limit = _MAX_SIZE.get(self.kind)
        if self.size is not None and (limit is None or not 0 < self.size <= limit):
            raise VariantError(f"param {self.name}: {self.kind} takes no size of {self.size}")
        if self.kind == "per_distance" and self.size is None:
            raise VariantError(f"param {self.name}: a table by distance needs its size")
        if isinstance(self.default, np.ndarray | list):
            object.__setattr__(self, "default", _frozen(np.asarray(self.default).tolist()))

    def shape(self, num_heads: int) -> tuple[int, ...]:
        size = () if self.size is None else (self.size,)
        return (num_heads, *size) if self.kind in KINDS_BY_HEAD else size

    def check(self, value: Any, num_heads: int) -> np.ndarray:
        """``value`` in the declared shape and dtype. One number stands for all entries.

        Raises VariantError for another shape, and for what is no finite number.
        """
        try:
            array = np.asarray(value)
            if array.dtype.kind not in "iuf":
                raise ValueError
        except ValueError:
            raise VariantError(
                f"param {self.name}: {_short(value)} is not made of numbers"
            ) from None
        shape = self.shape(num_heads)
        if array.ndim and array.shape != shape:
            raise VariantError(
                f"param {self.name}: takes shape {list(shape)} ({self.kind}), not "
                f"{list(array.shape)}"
            )
        if not np.isfinite(array).all() or np.abs(array).max(initial=0) > 2**31 - 1:
            raise VariantError(f"param {self.name}: {_short(value)} is out of range")
        if self.dtype == "int32" and (array != np.trunc(array)).any():
            raise VariantError(f"param {self.name}: {_short(value)} must hold whole numbers")
        return np.broadcast_to(array.astype(self.dtype), shape)

    def value(self, num_heads: int) -> np.ndarray:
        """Its default."""
        default = self.default(num_heads) if callable(self.default) else self.default
        return self.check(default, num_heads)


# Positions are int32, heads int32, all of shapes that broadcast with the score's tile.
ScoreMod = Callable[[Array, Array, Array, Array, SimpleNamespace], Array]
MaskMod = Callable[[Array, Array, Array, SimpleNamespace], Array]
KvRange = Callable[[Array, Array, SimpleNamespace], tuple[Any, Any]]


@dataclass(frozen=True)
class AttentionVariant:
    """
    - ``score_mod(score, q_pos, kv_pos, head, params) -> score``: float32, after scaling; -inf hides
      the pair.
    - ``mask_mod(q_pos, kv_pos, head, params) -> bool``: True where visible, in addition to
      causality.
    - ``kv_range(q_first, q_last, params) -> (first, last)``: no query from ``q_first`` to
      ``q_last`` of one row sees a position before ``first`` or after ``last``. Scalars; traced
      outside kernels, so any JAX operation will do, and a per_head param holds all heads' numbers
      (all of its device, where heads are shared out).
    - ``sinks``: name of a per_head param, a logit per head that takes part in softmax and has no
      value.
    - ``lookahead``: name of a per_row int32 param, how many of a row's first tokens see ahead.
      ``mask_mod`` then decides alone, up to what has been written, and lets only queries of these
      tokens see later keys, of these tokens. They are to be fed in one step.
    - ``head_axis``: what ``head_shares.shared_out`` sets.

    Raises VariantError for what no backend could serve.
    """

    name: str
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    kv_range: KvRange | None = None
    sinks: str | None = None
    lookahead: str | None = None
    params: tuple[Param, ...] = ()
    head_axis: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.params, tuple):
            raise VariantError(f"{self.name}: params must be a tuple: params=(Param(...),)")
        names = [param.name for param in self.params]
        if len(set(names)) != len(names):
            raise VariantError(f"{self.name}: two params have the same name")
        kinds = {param.name: param.kind for param in self.params}
        if self.sinks is not None and kinds.get(self.sinks) != "per_head":
            raise VariantError(f"{self.name}: sinks must name a per_head param, not {self.sinks!r}")
        if self.lookahead is not None:
            self._check_lookahead()
        if len(self.token_params) > MAX_PER_TOKEN:
            raise VariantError(f"{self.name}: at most {MAX_PER_TOKEN} params may be per_token")
        for field, count in (("score_mod", 5), ("mask_mod", 4), ("kv_range", 3)):
            function = getattr(self, field)
            if function is not None:
                _check_function(f"{self.name}: {field}", function, count)

    def _check_lookahead(self) -> None:
        if self.mask_mod is None:
            raise VariantError(f"{self.name}: lookahead without mask_mod would see everything")
        named = [param for param in self.row_params if param.name == self.lookahead]
        if not named or named[0].size is not None or named[0].dtype != "int32":
            raise VariantError(
                f"{self.name}: lookahead must name a per_row int32 param without a size, not "
                f"{self.lookahead!r}"
            )

    @property
    def is_plain(self) -> bool:
        """Causal attention and nothing else."""
        return replace(self, name="") == replace(CAUSAL, name="")

    @property
    def row_params(self) -> tuple[Param, ...]:
        """What a request may bring."""
        return tuple(param for param in self.params if param.kind == "per_row")

    @property
    def is_mapped(self) -> bool:
        """Whether the mask must be asked what it hides, since there is no ``kv_range`` to say so.
        One that looks at numbers of tokens is not: they lie in every layer's own pages."""
        asked = self.mask_mod is not None and self.kv_range is None
        return asked and (not self.token_params or not _looks_at_tokens(self))

    @property
    def token_params(self) -> tuple[Param, ...]:
        """What is kept of every token, in the order in which pages hold it."""
        return tuple(param for param in self.params if param.kind == "per_token")

    @property
    def array_params(self) -> tuple[Param, ...]:
        """All others, which a step has as arrays."""
        return tuple(param for param in self.params if param.kind != "per_token")

    def bind(self, values: Mapping[str, Any], num_heads: int | None = None) -> "AttentionVariant":
        """The variant with other defaults. Raises VariantError for unknown names, and where
        ``num_heads`` is known for wrong shapes."""
        unknown = set(values) - {param.name for param in self.params}
        if unknown:
            known = ", ".join(param.name for param in self.params) or "none"
            raise VariantError(f"{self.name} has no param {min(unknown)!r}; it has: {known}")
        bound = tuple(
            replace(param, default=_frozen(values[param.name])) if param.name in values else param
            for param in self.params
        )
        if num_heads is not None:
            for param in bound:
                param.value(num_heads)
        return replace(self, params=bound)

    def without_values(self) -> "AttentionVariant":
        """What its code depends on: layers that differ by values share one kernel."""
        return replace(self, params=tuple(replace(param, default=0.0) for param in self.params))


def _frozen(value: Any) -> Default:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _check_function(where: str, function: Any, count: int) -> None:
    if not callable(function):
        raise VariantError(f"{where} must be a function")
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        raise VariantError(f"{where} must take {count} arguments") from None
    if not inspect.isfunction(function):
        return
    outside = inspect.getclosurevars(function)
    for name, value in {**outside.globals, **outside.nonlocals}.items():
        if isinstance(value, np.ndarray | jax.Array) and value.size > 1:
            raise VariantError(
                f"{where} uses the array {name!r} from outside, which no kernel can: declare it "
                "as a Param"
            )
        if isinstance(value, jax.Array):
            raise VariantError(
                f"{where} uses {name!r} from outside, which is an array of JAX: write the number "
                f"as Python does, {name} = {value.item()!r}"
            )


@cache
def _looks_at_tokens(variant: AttentionVariant) -> bool:
    """Whether the mask fails without the per_token params."""

    def shape(param: Param) -> Any:
        one = jax.ShapeDtypeStruct((), param.dtype)
        return (one,) * param.size if param.kind == "per_row" and param.size else one

    def mask(q_pos: Any, kv_pos: Any, head: Any, values: Any) -> Any:
        assert variant.mask_mod is not None
        return variant.mask_mod(q_pos, kv_pos, head, SimpleNamespace(**values))

    position = jax.ShapeDtypeStruct((), "int32")
    values = {param.name: shape(param) for param in variant.array_params}
    try:
        jax.eval_shape(mask, position, position, position, values)
    except Exception:  # what else is wrong with it, check_functions says
        return True
    return False


CAUSAL = AttentionVariant("causal")
