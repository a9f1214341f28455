"""Parses server-sent events from bytes, however they were cut up. Knows no connection, no JSON."""

from collections.abc import Iterator


class EventStreamParser:
    """Takes bytes as they come, gives the ``data`` of every event that is complete.

    After the HTML standard: lines end with LF, CR or CRLF; a blank line ends an event; several
    data lines are joined by LF; comments, other fields and an event cut off at the end of the
    stream are left out.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a line whose end has not come yet
        self._after_cr = False  # an LF that comes first now belongs to the CR before it
        self._data: list[str] = []

    def feed(self, part: bytes) -> Iterator[str]:
        """Raises UnicodeDecodeError for a data line that is not UTF-8."""
        if self._after_cr and part:
            part = part.removeprefix(b"\n")
            self._after_cr = False
        # Only CR and LF: bytes.splitlines() splits at nothing else.
        lines = (self._rest + part).splitlines(keepends=True)
        self._rest = b""
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            self._rest = lines.pop()
        elif lines:
            self._after_cr = lines[-1].endswith(b"\r")
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                yield event

    def _line(self, line: bytes) -> str | None:
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode())
        return None
