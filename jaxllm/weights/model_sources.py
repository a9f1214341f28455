"""Which places a model may come from, where the operator has named them."""

from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import ConfigError, ModelUnavailableError
from jaxllm.weights import default_model


def check_source(name: str, allowed: Sequence[str]) -> None:
    """Whether ``allowed`` covers ``name``, before anything is read or fetched.

    ``allowed`` holds directories (written with a leading /, . or ~; what lies below them is
    allowed too, links followed), owners on the Hub, single repositories, and the default model's
    name. Empty allows everything.

    Raises:
        ModelUnavailableError: it does not.
        ConfigError: an entry that is none of these.
    """
    for entry in allowed:
        if not entry or (entry.count("/") > 1 and not _is_directory(entry)):
            raise ConfigError(
                f"--allowed-model-sources {entry!r} is neither a directory (/models, ./models), "
                "nor an owner or repository on the Hub."
            )
    if not allowed:
        return
    path = Path(name).expanduser()
    if name == default_model.NAME:
        found = name in allowed
    elif path.exists():
        real = path.resolve()
        found = any(
            real.is_relative_to(Path(entry).expanduser().resolve())
            for entry in allowed
            if _is_directory(entry)
        )
    else:
        found = "/" in name and (name in allowed or name.partition("/")[0] in allowed)
    if not found:
        raise ModelUnavailableError(
            f"{name!r} does not come from where --allowed-model-sources allows models to come "
            f"from: {', '.join(allowed)}"
        )


def _is_directory(entry: str) -> bool:
    return entry.startswith(("/", ".", "~"))
