"""One connection: uvicorn's HTTP/1.1 protocol, with bounds on time, size and ambiguity.

It is the one over httptools, whose parser (llhttp) refuses bare line feeds, folded header lines and
conflicting lengths, which h11 takes; and it is the faster of the two with a thousand streams.
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import Any, cast, override

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxllm.errors import JaxLLMError
from server.errors import MalformedHTTPError, SlowRequestError, TooManyConnectionsError
from server.protocol.head import body_too_large, head_error, head_too_large, without_upgrade
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import RefusalLog, refusal


class Phase(Enum):
    """What is expected of the client."""

    HEAD = auto()  # (the rest of) a request's head
    BODY = auto()  # the rest of its body; the answer may be under way, or even complete
    ANSWER = auto()  # nothing: it gets its answer
    IDLE = auto()  # another request, or the end
    LAST = auto()  # nothing: it has sent the next request too early, which is not read
    REFUSED = auto()  # to hang up


class _Stop(Exception):
    """Ends the parser's work from inside one of its callbacks."""


def http_protocol(limits: ConnectionLimits, refusals: RefusalLog) -> type[asyncio.Protocol]:
    """What ``uvicorn.Config(http=...)`` takes."""
    return cast(type[asyncio.Protocol], partial(GuardedProtocol, limits=limits, refusals=refusals))


class GuardedProtocol(HttpToolsProtocol):
    """Whoever breaks a rule is told which, in OpenAI's error schema, and the connection is closed.

    One request at a time: what is sent before the answer has ended is not read, and the connection
    ends with that answer, so that two requests can never be taken for one another.
    """

    def __init__(
        self, *args: Any, limits: ConnectionLimits, refusals: RefusalLog, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._refusals = refusals
        self._phase = Phase.HEAD
        self._since = self.loop.time()  # of the phase
        self._raw = bytearray()  # of a head that is not complete, and what came with its end
        self._num_wire_bytes = 0  # after the head
        self._num_body_bytes = 0
        self._stopped_by: JaxLLMError | None = None
        self._proposes_upgrade = False
        self._half_closed = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # The connection

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._limits.max_buffered_bytes)
        if len(self.connections) > self._limits.max_connections and not self._make_room():
            error = TooManyConnectionsError("Too many connections are open. Try again later.")
            self._refuse(error, linger=False)
        else:
            self._expect_head()

    def _make_room(self) -> bool:
        """Hang up on whoever has kept us waiting longest for a whole request, if anybody has."""
        others = [cast(GuardedProtocol, c) for c in self.connections if c is not self]
        waiting = (Phase.HEAD, Phase.BODY, Phase.IDLE)
        waited_for = [other for other in others if other._phase in waiting]
        if not waited_for:
            return False
        oldest = min(waited_for, key=lambda other: other._since)
        oldest._enter(Phase.REFUSED)
        oldest.transport.abort()
        self._refusals.note("connection_replaced")
        return True

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._enter(Phase.REFUSED)
        self._unset_keepalive_if_required()
        self._unwatch_writes()

    @override
    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.REFUSED:
            return
        if self._phase is Phase.IDLE:
            self._expect_head()
        if self._phase is Phase.HEAD:
            self._raw += data
        else:
            self._num_wire_bytes += len(data)
        if self._phase is Phase.LAST:
            if self._num_wire_bytes > self._limits.max_wire_bytes:
                self.transport.abort()
            return
        self._feed(data)
        if self._phase is Phase.HEAD and len(self._raw) > self._limits.max_head_bytes:
            self._refuse(head_too_large(self._limits))
        elif self._phase is Phase.BODY and self._num_wire_bytes > self._limits.max_wire_bytes:
            self._refuse(body_too_large(self._limits))  # nothing but framing

    @override
    def eof_received(self) -> bool:
        """Whoever has asked may hear the end of it, though it looks as if it had gone.

        Returns whether the connection stays open for that.
        """
        if self._phase not in (Phase.ANSWER, Phase.LAST):
            return False
        self._half_closed = True
        self.cycle.keep_alive = False
        self.cycle.message_event.set()  # wakes who waits for the client to go
        return True

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._phase in (Phase.LAST, Phase.REFUSED):
                return
            if self._proposes_upgrade and self._raw:
                self._proposes_upgrade = False
                whole, self._raw = without_upgrade(bytes(self._raw)), bytearray()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._feed(whole)
                return
            self._refuse(self._stopped_by or _malformed(error))

    # The parser's callbacks

    @override
    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._enter(Phase.LAST)
            raise _Stop
        if self._phase is Phase.IDLE:  # it came with the end of a body
            self._expect_head()
        self._num_body_bytes = self._num_wire_bytes = 0
        self._unwatch_writes()
        super().on_message_begin()

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is not Phase.HEAD:
            return  # trailer fields mean nothing to us, and must not join the headers
        if len(self.headers) >= self._limits.max_fields:
            self._stop(head_too_large(self._limits))
        super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._proposes_upgrade = True
            raise _Stop
        version = self.parser.get_http_version()
        error = head_error(version, self.url, self.headers, self._limits)
        if error is not None:
            self._stop(error)
        # What came with the end of the head belongs to the body.
        self._num_wire_bytes = max(0, len(self._raw) - self._raw.find(b"\r\n\r\n") - 4)
        self._raw.clear()
        self._enter(Phase.BODY, self._limits.body_timeout_s, self._too_slow)
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        if self._num_body_bytes > self._limits.max_body_bytes:
            self._stop(body_too_large(self._limits))
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._enter(Phase.IDLE if self.cycle.response_complete else Phase.ANSWER)

    def _stop(self, error: JaxLLMError) -> None:
        self._stopped_by = error
        raise _Stop

    # Answers

    @override
    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        async def watched(scope: Any, receive: Any, send: Any) -> None:
            whole = False

            async def receive_until_closed() -> Any:
                nonlocal whole
                message = {} if whole and self._half_closed else await receive()
                if whole and self._half_closed:
                    return {"type": "http.disconnect"}
                whole = not message.get("more_body", False)
                return message

            try:
                await app(scope, receive_until_closed, send)
            finally:
                self.loop.call_soon(self._watch_writes)

        super()._start_asgi_task(cycle, watched)

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is Phase.ANSWER:
            self._enter(Phase.IDLE)

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch_writes()
        self._watch_writes()

    # Time

    def _enter(
        self, phase: Phase, limit_s: float = 0.0, at_limit: Callable[[], None] | None = None
    ) -> None:
        self._phase = phase
        self._since = self.loop.time()
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = None if at_limit is None else self.loop.call_later(limit_s, at_limit)

    def _expect_head(self) -> None:
        self._unset_keepalive_if_required()
        self._raw.clear()
        self._enter(Phase.HEAD, self._limits.head_timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        if self._phase is Phase.HEAD and not self._raw:
            self._enter(Phase.REFUSED)
            self.transport.close()  # it has asked nothing
            return
        part = "head" if self._phase is Phase.HEAD else "body"
        self._refuse(SlowRequestError(f"The request's {part} did not arrive in time."))

    def _watch_writes(self) -> None:
        """Whether the client takes what is waiting for it, while nothing is added to that."""
        adding = self.cycle is not None and not self.cycle.response_complete
        adding = adding and not self.flow.write_paused and not self.transport.is_closing()
        pending = self.transport.get_write_buffer_size()
        if self._write_timer is None and pending and not adding:
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self._check_writes, pending
            )

    def _unwatch_writes(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_writes(self, pending: int) -> None:
        self._write_timer = None
        left = self.transport.get_write_buffer_size()
        if left and pending - left < self._limits.min_taken_bytes:
            self._refusals.note("slow_reader")
            self.transport.abort()
        else:
            self._watch_writes()

    # The end

    def _refuse(self, error: JaxLLMError, *, linger: bool = True) -> None:
        """Say why, where an answer can still be given, and hang up. A client that still sends
        would not see the answer if nobody read on: so we do, for a moment.
        """
        answered = self._abandon_request()
        self._unset_keepalive_if_required()
        self._refusals.note(error.code or "invalid_request")
        self._enter(Phase.REFUSED)
        if not answered:
            self.transport.write(refusal(error))
        if answered or not linger:
            self.transport.close()
            return
        self._enter(Phase.REFUSED, self._limits.linger_s, self.transport.abort)
        self.flow.resume_reading()
        self.transport.write_eof()

    def _abandon_request(self) -> bool:
        """Tell the application that the client has gone. Returns whether an answer had begun."""
        cycle = self.cycle
        if cycle is None or (cycle.response_complete and self._phase is not Phase.BODY):
            return False
        if not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        return cycle.response_started


def _malformed(error: Exception) -> MalformedHTTPError:
    """The parser's own errors are fixed texts that say what was wrong."""
    own = type(error) in (httptools.HttpParserError, httptools.HttpParserInvalidMethodError)
    return MalformedHTTPError(f"This is not HTTP as it should be{f': {error}' if own else ''}.")
