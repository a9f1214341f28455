"""The Host header must name this server, so that no web page can reach it under a name of its own
(DNS rebinding).
"""

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import HostNotAllowedError


class HostMiddleware:
    """``allowed``: names, or ``*.name`` for all below one; empty or with ``*``: any. Addresses are
    always accepted, since nobody but their owner can be found at one.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]):
        self._app = app
        self._any = not allowed or "*" in allowed
        names = [name.lower() for name in allowed]
        self._names = frozenset(names)
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _name_in(Headers(scope=scope).get("host", ""))
        if not self._any and not self._accepts(host):
            raise HostNotAllowedError(
                f"This server does not go by the name {host[:64]!r}. Its operator can allow it "
                "with --allowed-hosts."
            )
        await self._app(scope, receive, send)

    def _accepts(self, host: str) -> bool:
        if not host or host in self._names or host.endswith(self._suffixes):
            return True  # browsers always send one
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def _name_in(host: str) -> str:
    """``example.org`` of ``Example.org.:80``, ``::1`` of ``[::1]:80``."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")
