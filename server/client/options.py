"""What the command line says to the clients: the one definition of their flags and help."""

from dataclasses import dataclass
from typing import Any

from jaxllm.config.engine import flag
from jaxllm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Of ``jaxllm chat``. None is not sent: the server's own default holds."""

    url: str | None = flag(None, "talk to this server; MODEL is then the name it serves")
    system: str | None = flag(None, "system prompt")
    temperature: float | None = flag(None, "0 for the most likely token, always")
    top_p: float | None = flag(None, "choose among the likeliest that have this share together")
    top_k: int | None = flag(None, "choose among so many of the likeliest")
    min_p: float | None = flag(None, "choose among those this likely, next to the likeliest")
    max_tokens: int | None = flag(None, "longest answer")

    def fields(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """Of ``jaxllm run-batch``. Raises ConfigError."""

    url: str | None = flag(None, "send the requests to this server instead")
    max_concurrency: int = flag(256, "requests at once")
    served_model_names: tuple[str, ...] = flag(
        (),
        "what the requests call a local model; default: MODEL as given",
        flag="served-model-name",
    )

    def __post_init__(self) -> None:
        if self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency must be at least 1, got {self.max_concurrency}.")
        if self.url is not None and self.served_model_names:
            raise ConfigError("--served-model-name is for a local model: leave it out with --url.")
