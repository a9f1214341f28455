"""What a request changes on the way through the model."""

from collections.abc import Sequence
from hashlib import blake2b
from math import isfinite
from typing import Any

import msgspec
import numpy as np

from jaxllm.errors import InvalidRequestError
from jaxllm.taps.sites import TapShapes

MAX_VECTORS = 8  # Steer and Patch of one request
MAX_INTERVENTIONS = 1024
MAX_POSITION = 2**31 - 1
Vector = bytes | Sequence[float]  # float32, little-endian once it has been taken in


class Steer(msgspec.Struct, frozen=True, tag="steer", forbid_unknown_fields=True):
    """Adds ``coefficient * vector`` to ``resid.{layer}`` at the positions from ``first`` to
    ``last``, prompt and answer alike.
    """

    layer: int
    vector: Vector
    coefficient: float = 1.0
    first: int = 0
    last: int = MAX_POSITION

    def __post_init__(self) -> None:
        _check_layer(self.layer)
        _check_integer("first", self.first)
        _check_integer("last", self.last)
        if not isinstance(self.coefficient, int | float) or not isfinite(self.coefficient):
            raise wrong("the coefficient of a steer must be a finite number")
        vector = _float32(self.vector)
        with np.errstate(over="ignore"):
            if not np.isfinite(np.float32(self.coefficient) * np.frombuffer(vector, "<f4")).all():
                raise wrong("coefficient times vector must be within float32")
        msgspec.structs.force_setattr(self, "vector", vector)


class Patch(msgspec.Struct, frozen=True, tag="patch", forbid_unknown_fields=True):
    """Puts ``vector`` in the place of ``resid.{layer}`` at one position."""

    layer: int
    position: int
    vector: Vector

    def __post_init__(self) -> None:
        _check_layer(self.layer)
        _check_integer("position", self.position)
        msgspec.structs.force_setattr(self, "vector", _float32(self.vector))


class AblateHead(msgspec.Struct, frozen=True, tag="ablate_head", forbid_unknown_fields=True):
    """Takes what one head of a layer attends to away, at all positions."""

    layer: int
    head: int

    def __post_init__(self) -> None:
        _check_layer(self.layer)
        _check_integer("head", self.head)


Intervention = Steer | Patch | AblateHead


def check_form(interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """Raises InvalidRequestError for too many, or for what is none."""
    found = tuple(interventions)
    if not all(isinstance(item, Intervention) for item in found):
        raise wrong("it must hold Steer, Patch and AblateHead")
    if len(found) > MAX_INTERVENTIONS:
        raise wrong(f"it may hold at most {MAX_INTERVENTIONS}")
    if sum(not isinstance(item, AblateHead) for item in found) > MAX_VECTORS:
        raise wrong(f"a request may steer and patch {MAX_VECTORS} times at most")
    return found


def check_fit(interventions: Sequence[Intervention], shapes: TapShapes, num_fed: int) -> None:
    """Raises InvalidRequestError for what this model does not have, and for a patched position
    that will not be fed.
    """
    for item in interventions:
        most = shapes.num_layers - isinstance(item, AblateHead)
        if item.layer > most:
            raise wrong(f"there is no layer {item.layer}: it must be 0 to {most}")
        if isinstance(item, AblateHead):
            if item.head >= shapes.num_heads:
                raise wrong(f"there is no head {item.head}: it must be 0 to {shapes.num_heads - 1}")
            continue
        count = len(item.vector) // 4
        if count != shapes.hidden_size:
            raise wrong(f"a vector has {count} numbers; this model's have {shapes.hidden_size}")
        if isinstance(item, Patch) and item.position >= num_fed:
            raise wrong(f"position {item.position} is none of the {num_fed} that will be fed")


def interventions_key(interventions: Sequence[Intervention] | None) -> str:
    """Says all that cached keys and values depend on; "" for none."""
    if not interventions:
        return ""
    return blake2b(msgspec.msgpack.encode(interventions), digest_size=16).hexdigest()


def wrong(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid 'interventions': {reason}.", param="interventions", code="invalid_value"
    )


def _float32(vector: Any) -> bytes:
    try:
        if isinstance(vector, bytes):
            array = np.frombuffer(vector, "<f4")
        else:
            with np.errstate(over="ignore"):  # infinity is refused below
                array = np.asarray(vector, dtype=np.float64).astype("<f4")
    except (TypeError, ValueError):
        raise wrong("a vector must be numbers, or float32 bytes") from None
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise wrong("a vector must be a list of finite numbers, within float32")
    return array.tobytes()


def _check_layer(layer: object) -> None:
    _check_integer("layer", layer)


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= MAX_POSITION:
        raise wrong(f"{name} must be an integer of at least 0")
