"""At which positions a request's taps are read."""

from collections.abc import Sequence

from jaxllm.errors import InvalidRequestError

MAX_POSITIONS = 4096  # in a list
# "last": of the prompt. "all": of the prompt and of every generated token that is fed, which is all
# but the last. Or positions: below zero they count from the end of the prompt.
TapPositions = str | Sequence[int]


def check_positions(value: TapPositions) -> str | tuple[int, ...]:
    """Raises InvalidRequestError for another form."""
    if isinstance(value, str):
        if value not in ("last", "all"):
            raise _wrong(f"it must be 'last', 'all' or a list of positions, not {value[:64]!r}")
        return value
    positions = tuple(value)
    if not all(type(item) is int and abs(item) < 2**31 for item in positions):
        raise _wrong("a list must hold integers")
    if not 0 < len(positions) <= MAX_POSITIONS:
        raise _wrong(f"a list holds 1 to {MAX_POSITIONS} positions")
    return positions


def tapped_between(value: TapPositions, prompt_len: int, start: int, end: int) -> Sequence[int]:
    """The tapped ones of the positions ``start`` to ``end - 1``, ascending."""
    if value == "all":
        return range(start, end)
    wanted = (-1,) if isinstance(value, str) else value
    found = {item if item >= 0 else prompt_len + item for item in wanted}
    return sorted(item for item in found if start <= item < end)


def check_reach(value: TapPositions, prompt_len: int, num_fed: int) -> None:
    """Raises InvalidRequestError for a position that will not be fed."""
    for item in () if isinstance(value, str) else value:
        position = item if item >= 0 else prompt_len + item
        if not 0 <= position < num_fed:
            raise _wrong(
                f"the position {item} is none of the {num_fed} that prompt and max_tokens make"
            )


def _wrong(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid 'tap_positions': {reason}.", param="tap_positions", code="invalid_value"
    )
