"""Names of what can be read on the way through a model, and how large it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.errors import InvalidRequestError

KINDS = ("resid", "attn_out", "attn_probs", "logits")
OF_STATES = ("resid", "logits")  # numbered 0 (the embedding) to num_layers; the others by layer
MAX_SITES = 1024  # of one request


@dataclass(frozen=True, slots=True)
class TapShapes:
    """What sizes of taps follow from."""

    num_layers: int
    num_heads: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Site:
    """- ``resid.N``: the residual stream after N layers: 0 is the embedding, ``num_layers`` what
      the final norm reads.
    - ``logits.N``: what the final norm and the output matrix make of it.
    - ``attn_out.N``: what attention adds to the residual stream in layer N.
    - ``attn_probs.N``: attention probabilities of layer N, ``[heads, keys]``.
    """

    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.number}"

    def num_values(self, position: float, shapes: TapShapes) -> float:
        """float32 numbers at one position; at the mean of several, their mean."""
        match self.kind:
            case "logits":
                return shapes.vocab_size
            case "attn_probs":
                return shapes.num_heads * (position + 1)
            case _:
                return shapes.hidden_size


def parse_site(name: str) -> Site:
    """Raises InvalidRequestError for what is no name of a tap."""
    kind, _, number = name.partition(".")
    if kind not in KINDS or not (number.isascii() and number.isdecimal() and len(number) < 6):
        raise _wrong(f"{name[:64]!r} is no tap: use {', '.join(f'{k}.N' for k in KINDS)}")
    return Site(kind, int(number))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """In their plain spelling, each once. Raises InvalidRequestError."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise _wrong("it must be a list of names")
    if len(names) > MAX_SITES:
        raise _wrong(f"it may hold at most {MAX_SITES} names")
    return tuple(dict.fromkeys(parse_site(name).name for name in names))


def check_sites(names: Sequence[str], shapes: TapShapes) -> tuple[Site, ...]:
    """Raises InvalidRequestError for what this model does not have."""
    sites = tuple(parse_site(name) for name in names)
    for site in sites:
        most = shapes.num_layers - (site.kind not in OF_STATES)
        if site.number > most:
            raise _wrong(f"{site.name} does not exist; this model has {site.kind}.0 to {most}")
    return sites


def _wrong(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid 'taps': {reason}.", param="taps", code="invalid_value")
