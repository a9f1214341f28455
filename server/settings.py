"""What was asked of the server: the one definition of its flags, their defaults and their help.

The engine's settings are ``jaxllm.config.engine``'s. A field without help is no flag: it is found
out at start, or only tests change it.
"""

from dataclasses import dataclass

from jaxllm.config.engine import flag
from jaxllm.config.limits import MAX_N
from jaxllm.errors import ConfigError
from jaxllm.parsers.choice import AUTO, check_names

LOG_LEVELS = ("debug", "info", "warning", "error")
ACCESS_LOGS = ("json", "text", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Raises ConfigError for values that cannot work."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(8000, "0: any free one")
    served_model_names: tuple[str, ...] = flag(
        (), "what clients call the model; default: MODEL as given", flag="served-model-name"
    )
    api_keys: tuple[str, ...] = flag(
        (), "accepted keys (default: $JAXLLM_API_KEY)", flag="api-key", secret=True
    )
    api_key_file: str | None = flag(
        None, "file with accepted keys, one a line; behind it, for fair scheduling: weight=2"
    )
    insecure_no_auth: bool = flag(False, "listen on a public address without a key")
    metrics_no_auth: bool = flag(False, "answer /metrics without a key")
    allowed_hosts: tuple[str, ...] = flag(
        (), "accepted Host headers, * for any; default on a loopback address: names of this machine"
    )
    cors_origins: tuple[str, ...] = flag(
        (), "web pages that may read answers, such as https://example.org", flag="cors-origin"
    )
    max_connections: int = flag(2048, "open at once")
    max_body_bytes: int = flag(4 * 2**20, "larger request bodies: 413")
    max_n: int = flag(16, f"choices per prompt that a request may ask for, at most {MAX_N}")
    max_num_queued_reqs: int = flag(2048, "sequences that wait; beyond them: 429")
    max_num_queued_tokens: int = flag(4 * 2**20, "their prompts' tokens; beyond them: 429")
    request_timeout: float = flag(3600.0, "seconds a request may take; beyond them: 504")
    drain_timeout: float = flag(30.0, "seconds that running requests get after SIGTERM or Ctrl-C")
    tool_call_parser: str = flag(
        AUTO, "how the model writes calls of tools; auto: as its chat template does; or none"
    )
    reasoning_parser: str = flag(AUTO, "how the model marks its thoughts; auto, a name or none")
    enable_auto_tool_choice: bool = flag(True, "read calls of tools where a request has tools")
    strict_params: bool = flag(False, "refuse unknown request fields with 400")
    ui: bool = flag(False, "serve a page for chatting at /")
    log_level: str = flag("info", "of the server's own messages", choices=LOG_LEVELS)
    access_log: str = flag("json", "one line per request", choices=ACCESS_LOGS)
    otlp_traces_endpoint: str | None = flag(
        None, "send a trace of every request to this URL (OTLP over HTTP)"
    )

    max_num_seqs: int = 0  # sequences the engine runs at once
    kv_cache_tokens: int = 0  # tokens its cache holds
    tenant_weights: tuple[str, ...] = ()  # as the engine's flag, from the file of keys
    fair: bool = False  # whether the engine shares fairly between keys
    ping_interval_s: float = 15.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, got {self.port}.")
        if not 1 <= self.max_n <= MAX_N:
            raise ConfigError(f"--max-n must be between 1 and {MAX_N}, got {self.max_n}.")
        check_names(self.tool_call_parser, self.reasoning_parser)
        for name in ("max_connections", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative.")
        if not 0 <= self.drain_timeout < float("inf"):
            raise ConfigError("--drain-timeout must not be negative.")
        if not self.request_timeout > 0:  # so that NaN is refused too
            raise ConfigError("--request-timeout must be more than 0 seconds.")
