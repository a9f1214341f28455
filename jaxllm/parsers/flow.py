"""Text on its way out. Whitespace waits until it is known what follows it."""

from jaxllm.parsers.events import Content, Event, Reasoning

MAX_SPACES = 1 << 10  # more of it in one place is sent in any case


class Flow:
    """``strips``: whitespace at the very beginning is no part of the text."""

    def __init__(self, kind: type[Content | Reasoning], out: list[Event], *, strips: bool = False):
        self._kind, self._out = kind, out
        self._strips = strips
        self._spaces = ""

    def add(self, text: str) -> None:
        text = self._spaces + text
        if self._strips:
            text = text.lstrip()
        body = text.rstrip()
        self._spaces = text[len(body) :]
        self._send(body)
        if len(self._spaces) > MAX_SPACES:
            self._send(self._spaces[:-MAX_SPACES])
            self._spaces = self._spaces[-MAX_SPACES:]

    def drop_spaces(self) -> None:
        """What comes next is not text: the whitespace before it only set it apart."""
        self._spaces = ""

    def end(self) -> None:
        self._send(self._spaces)
        self._spaces = ""

    def _send(self, text: str) -> None:
        if text:
            self._strips = False
            self._out.append(self._kind(text))
