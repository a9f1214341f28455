"""Keys, as Bearer or in ``x-api-key``. Every path needs one but those listed here; an unknown path
needs one too.
"""

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxllm.errors import AuthenticationError

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
ANYBODY = ""  # the tenant of requests without a key


class AuthMiddleware:
    """Compares digests in constant time, always against every key.

    ``scope["state"]["tenant"]`` then tells keys apart: a digest from which no key can be read.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], open_paths: Collection[str]):
        self._app = app
        self._open_paths = frozenset(open_paths)
        self._tenants = {_digest(key.encode()): tenant_of(key) for key in api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needs_key = self._tenants and scope["path"] not in self._open_paths
        values = _credentials(Headers(scope=scope))
        scope["state"]["tenant"] = self._tenant(values) if needs_key else ANYBODY
        await self._app(scope, receive, send)

    def _tenant(self, values: list[str]) -> str:
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key:
            error = AuthenticationError(
                "You didn't provide an API key. Send it in an Authorization header: "
                "Authorization: Bearer YOUR_KEY."
            )
            error.code = None
            raise error
        given = _digest(key.strip(" \t").encode("latin-1"))
        found = [name for own, name in self._tenants.items() if hmac.compare_digest(given, own)]
        if not found:
            raise AuthenticationError("Incorrect API key provided.")
        return found[0]


def _credentials(headers: Headers) -> list[str]:
    """Values of the Authorization header; without any, of what Anthropic's clients send instead."""
    given = headers.getlist("authorization")
    return given or [f"Bearer {key}" for key in headers.getlist("x-api-key")]


def tenant_of(key: str) -> str:
    """The same at every start, so that an operator can compute it; too short to verify a guess."""
    return hashlib.sha256(b"jaxllm tenant\0" + key.encode()).hexdigest()[:12]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
