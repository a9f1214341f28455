"""Finds stop strings in text that arrives in pieces of any size. Knows strings only."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through, holding back only what may yet become a stop string.

    The match that ends first wins; of several that end together, the longest. So the result does
    not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str] = (), include_in_output: bool = False):
        self._stops: tuple[str, ...] = tuple(stops)
        self._include = include_in_output
        self._held: str = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that may go out now. Check ``matched`` afterwards: nothing follows a match."""
        if not self._stops:
            return text
        text = self._held + text
        starts = [(stop, text.find(stop)) for stop in self._stops]
        found = [(start + len(stop), start, stop) for stop, start in starts if start >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[:end] if self._include else text[:start]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text is over."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
