"""What was asked of the server. The engine's settings are ``jaxllm.config.engine``'s."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    served_model_names: tuple[str, ...]  # the first one is how answers call the model
    api_keys: tuple[str, ...] = ()  # empty: no authentication
    max_num_queued_reqs: int | None = None  # sequences beyond max_num_seqs; None: any number
    max_num_seqs: int = 0  # sequences the engine runs at once
    max_body_bytes: int = 4 * 2**20
    ping_interval_s: float = 15.0
    strict_params: bool = False  # answer unknown fields with 400 instead of a log line
