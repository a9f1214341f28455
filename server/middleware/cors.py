"""Which web pages may read answers: an exact list of origins. Not installed without one."""

from typing import override

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from server.errors import OriginNotAllowedError, error_response
from server.middleware.request_id import HEADER

EXPOSED = (HEADER, "retry-after", "retry-after-ms", "x-should-retry")  # a page's client reads these


class OriginMiddleware(CORSMiddleware):
    """Starlette's, which answers a browser's preflight without a key, with our error body."""

    @override
    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = OriginNotAllowedError(
            "Web pages of this origin, or this method or header, are not allowed here. The "
            "server's operator can allow an origin with --cors-origin."
        )
        return error_response(error, "unknown")
