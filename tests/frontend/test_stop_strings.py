"""Stop strings do not depend on how the text was cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.frontend.stop_strings import StopStrings

SMALL = st.text(alphabet="ab😀", max_size=12)
STOPS = st.lists(st.text(alphabet="ab😀", min_size=1, max_size=4), max_size=3)


def feed(checker: StopStrings, parts: list[str]) -> str:
    out = ""
    for part in parts:
        out += checker.feed(part)
        if checker.matched is not None:
            return out
    return out + checker.flush()


@settings(max_examples=400, deadline=None)
@given(text=SMALL, stops=STOPS, cuts=st.lists(st.integers(0, 12)), include=st.booleans())
def test_any_split_gives_the_same(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    whole, split = StopStrings(stops, include), StopStrings(stops, include)
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges)]
    expected = feed(whole, [text])
    assert (feed(split, parts), split.matched) == (expected, whole.matched)
    assert (whole.matched is not None) == any(stop in text for stop in stops)
    if whole.matched is None:
        assert expected == text
    else:
        assert not include or expected.endswith(whole.matched)
        assert include or not any(stop in expected for stop in stops)
        assert text.startswith(expected)


def test_holds_back_no_more_than_it_must() -> None:
    checker = StopStrings(["END", "STOP"])
    assert checker.feed("the E") == "the "
    assert checker.feed("N") == ""
    assert checker.feed("T ST") == "ENT "
    assert checker.feed("OP more") == ""
    assert checker.matched == "STOP"


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
def test_include(include: bool, text: str) -> None:
    checker = StopStrings(["two"], include)
    assert checker.feed("one two three") == text


def test_nothing_to_look_for() -> None:
    checker = StopStrings()
    assert checker.feed("abc") == "abc" and checker.flush() == "" and checker.matched is None
