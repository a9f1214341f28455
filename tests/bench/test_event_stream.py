"""Events come out the same, wherever the bytes were cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.bench.event_stream import EventStreamParser

STREAM = (
    ': ping\n\ndata: {"a": 1}\n\ndata:no space\r\n\r\nid: 3\nevent: x\ndata: two\ndata: lines\n\n'
    "data: é😀\u2028\x0b\x85\r\rdata\n\n\n\ndata:  kept\n\ndata: [DONE]\n\ndata: cut off"
).encode()
EVENTS = ['{"a": 1}', "no space", "two\nlines", "é😀\u2028\x0b\x85", "", " kept", "[DONE]"]


def parse(*parts: bytes) -> list[str]:
    parser = EventStreamParser()
    return [data for part in parts for data in parser.feed(part)]


def test_events() -> None:
    assert parse(STREAM) == EVENTS
    assert parse(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_any_cut(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(STREAM)]
    parts = [STREAM[a:b] for a, b in pairwise(ends)]
    assert parse(*parts) == EVENTS


def test_half_a_character_is_an_error() -> None:
    with pytest.raises(UnicodeDecodeError):
        parse(b"data: \xe2\x82\n\n")
