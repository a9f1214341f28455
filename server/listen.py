"""Where the server listens, and who may then talk to it: address, keys, Host names, web pages."""

import ipaddress
import logging
import re
import resource
import socket
from dataclasses import replace
from pathlib import Path

from jaxllm.config import env
from jaxllm.errors import ConfigError
from server.middleware.auth import tenant_of
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

# Names that no stranger can make point here: browsers send them only to this machine, and Docker
# Desktop reaches its host as host.docker.internal.
LOOPBACK_NAMES = ("localhost", "*.localhost", "*.internal")
OTHER_FILES = 64  # open files that are no connections
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_WEIGHED = re.compile(r"(\S+)\s+weight=(\S+)")
_KEY = re.compile(r"[!-~\u00a1-\U0010ffff]+")


def guarded(settings: ServerSettings) -> ServerSettings:
    """``settings`` with keys read and defaults filled in; nothing listens yet.

    Raises:
        ConfigError: anybody on the network, or any web page, could use the server without a key;
            a key cannot be read or sent.
    """
    api_keys = read_api_keys(settings)
    check_exposure(settings.host, api_keys, settings.insecure_no_auth)
    check_origins(settings.cors_origins, api_keys)
    allowed_hosts, loopback = settings.allowed_hosts, is_loopback(settings.host)
    if not api_keys and not loopback:
        logger.warning("Anybody who reaches %s may use this server: it asks no key", settings.host)
    if not allowed_hosts and loopback:
        allowed_hosts = (*LOOPBACK_NAMES, socket.gethostname(), settings.host)
    return replace(
        settings,
        api_keys=api_keys,
        tenant_weights=read_tenant_weights(settings),
        allowed_hosts=allowed_hosts,
        max_connections=possible_connections(settings.max_connections),
    )


def read_api_keys(settings: ServerSettings) -> tuple[str, ...]:
    """Keys of the command line and of the file; of the environment where neither is given.

    Raises:
        ConfigError: the file cannot be read or holds no key, or no header could carry a key.
    """
    keys = settings.api_keys
    if settings.api_key_file is not None:
        lines = _lines_of(Path(settings.api_key_file))
        keys += tuple(_without_weight(line) for line in lines)
    keys = keys or env.api_keys()
    if not all(_KEY.fullmatch(key) for key in keys):
        raise ConfigError(
            "An API key is empty or holds spaces or control characters: no header could carry it. "
            "Check --api-key, --api-key-file and JAXLLM_API_KEY."
        )
    return tuple(dict.fromkeys(keys))


def read_tenant_weights(settings: ServerSettings) -> tuple[str, ...]:
    """Of the keys in the file that have ``weight=NUMBER`` behind them, as --tenant-weights takes
    them: by tenant, not by key.
    """
    if settings.api_key_file is None:
        return ()
    weighed = map(_WEIGHED.fullmatch, _lines_of(Path(settings.api_key_file)))
    return tuple(f"{tenant_of(found[1])}={found[2]}" for found in weighed if found)


def _without_weight(line: str) -> str:
    found = _WEIGHED.fullmatch(line)
    return line if found is None else found[1]


def _lines_of(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--api-key-file {path} cannot be read: {reason}.") from None
    stripped = (line.strip() for line in lines)
    lines = tuple(line for line in stripped if line and not line.startswith("#"))
    if not lines:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line.")
    return lines


def check_origins(origins: tuple[str, ...], api_keys: tuple[str, ...]) -> None:
    """Raises ConfigError for --cors-origin values that no browser sends, and for * with keys."""
    for origin in origins:
        if origin == "*" and api_keys:
            raise ConfigError(
                "--cors-origin * together with an API key would let any web page use a key that a "
                "browser knows. Name the pages' origins."
            )
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-origin {origin} is no origin: write it as browsers send it, in lower "
                "case and without a path, such as https://example.org."
            )


def possible_connections(wanted: int) -> int:
    """How many connections can be open: ``wanted``, or fewer if this process may not open more
    files. The limit on open files is raised as far as it may be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - OTHER_FILES)
    if possible < 1:
        raise ConfigError(f"This process may open {soft} files: too few. Raise `ulimit -n`.")
    if possible < wanted:
        logger.warning(
            "At most %d connections, not %d: raise `ulimit -n` for more", possible, wanted
        )
    return possible


def check_exposure(host: str, api_keys: tuple[str, ...], insecure_no_auth: bool) -> None:
    """Raises ConfigError for a server that anybody on the network could use without a key."""
    if api_keys or insecure_no_auth or is_loopback(host):
        return
    raise ConfigError(
        f"Refusing to listen on {host} without an API key: anybody who reaches it could use it. "
        "Give --api-key (or JAXLLM_API_KEY), or accept it with --insecure-no-auth."
    )


def is_loopback(host: str) -> bool:
    """Only this machine can reach ``host``. A name must resolve to such addresses only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(item[4][0])).is_loopback for item in found)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet.

    Raises:
        ConfigError: the address is taken, not ours, or does not exist.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {port}.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. "
            "Choose another with --host, --port."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
