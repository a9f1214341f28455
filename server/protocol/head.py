"""Rules about a request's head beyond its grammar, which the parser checks."""

import re
from collections.abc import Sequence

import httptools

from jaxllm.errors import JaxLLMError
from server.errors import BodyTooLargeError, HeadTooLargeError, MalformedHTTPError
from server.protocol.limits import ConnectionLimits

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


def head_error(
    version: str, url: bytes, headers: Headers, limits: ConnectionLimits
) -> JaxLLMError | None:
    """What is wrong with a head, if anything: what two servers might read differently, and what is
    too large.
    """
    if version not in ("1.0", "1.1"):
        return MalformedHTTPError(f"HTTP/{version} is not spoken here; use HTTP/1.1.")
    if sum(len(name) + len(value) + 4 for name, value in headers) > limits.max_head_bytes:
        return head_too_large(limits)
    if not _has_path(url):
        return MalformedHTTPError("The request's target is not a path or an http URL.")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return MalformedHTTPError(f"A request needs one Host header; this one has {len(hosts)}.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return MalformedHTTPError("The Host header is no host name.")
    return _framing_error(version, headers, limits)


def head_too_large(limits: ConnectionLimits) -> HeadTooLargeError:
    return HeadTooLargeError(
        f"The request's headers have more than {limits.max_head_bytes} bytes or more than "
        f"{limits.max_fields} fields."
    )


def body_too_large(limits: ConnectionLimits) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The request body is larger than {limits.max_body_bytes} bytes. Send a smaller one."
    )


def without_upgrade(request: bytes) -> bytes:
    """A request as it reads to a server that knows no other protocol to change to. Java's HTTP
    client proposes one with every first request, and the parser would then drop its body.
    """
    head, end, rest = request.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest


def _has_path(url: bytes) -> bool:
    try:
        return httptools.parse_url(url).path is not None
    except httptools.HttpParserInvalidURLError:
        return False


def _framing_error(version: str, headers: Headers, limits: ConnectionLimits) -> JaxLLMError | None:
    """Where a body ends must not be a matter of opinion."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if lengths and codings:
        return MalformedHTTPError("Content-Length and Transfer-Encoding exclude each other.")
    if len(lengths) > 1 or len(codings) > 1:
        return MalformedHTTPError("The body's length is given twice.")
    if codings and (version == "1.0" or codings[0].lower() != b"chunked"):
        return MalformedHTTPError("The only Transfer-Encoding taken is chunked, with HTTP/1.1.")
    # The parser has made sure of digits; Python refuses to read thousands of zeros.
    if lengths and int(lengths[0].strip().lstrip(b"0") or b"0") > limits.max_body_bytes:
        return body_too_large(limits)
    return None
