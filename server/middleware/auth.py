"""Bearer keys. Every path needs one but those listed here; an unknown path needs one too."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxllm.errors import AuthenticationError
from server.errors import error_response

OPEN_PATHS = frozenset({"/health"})


class AuthMiddleware:
    """Compares digests in constant time, always against every key."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in OPEN_PATHS:
            error = self._refusal(Headers(scope=scope).getlist("authorization"))
            if error is not None:
                response = error_response(error, scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, values: list[str]) -> AuthenticationError | None:
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key:
            error = AuthenticationError(
                "You didn't provide an API key. Send it in an Authorization header: "
                "Authorization: Bearer YOUR_KEY."
            )
            error.code = None
            return error
        given = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return None if any(matches) else AuthenticationError("Incorrect API key provided.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
