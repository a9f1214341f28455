"""What one connection may cost."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    max_connections: int = 2048
    max_head_bytes: int = 32 * 1024  # request line and header fields
    max_fields: int = 100
    max_body_bytes: int = 4 * 2**20
    max_buffered_bytes: int = 128 * 1024  # of an answer that is not taken; then its writer waits
    head_timeout_s: float = 10.0  # from the connection, or a request's first byte, to its body
    body_timeout_s: float = 30.0  # from there to the body's end
    write_timeout_s: float = 30.0  # in each, a client that keeps us waiting must take something:
    min_taken_bytes: int = 32 * 1024
    linger_s: float = 2.0  # a refused client is listened to, so that it reads why

    @property
    def max_wire_bytes(self) -> int:
        """Of a body with its framing: a chunk of one byte takes six."""
        return 8 * self.max_body_bytes + self.max_head_bytes
