"""generation_config.json: how a model's answers end, and how its makers would have them sampled."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.models.hf_config import HFConfig
from jaxllm.sampling_params import SamplingParams
from jaxllm.weights.json_file import read_json_object

# What is read of it, as vLLM does. ``do_sample`` and the lengths that count the prompt are not.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NOTHING = SamplingParams()


@dataclass(frozen=True)
class GenerationConfig:
    """``sampling`` has fields of ``SamplingParams``, those alone that change something."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, int | float] = field(default_factory=dict)
    max_new_tokens: int | None = None

    def __str__(self) -> str:
        limit = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        return ", ".join(f"{name} {value}" for name, value in (self.sampling | limit).items())


def read_generation_config(directory: Path, *, recommends: bool = True) -> GenerationConfig:
    """Of a model without the file, an empty one. Without ``recommends`` only ends are read, which
    are the model's own.

    Raises:
        CheckpointError: the file is not JSON.
        ConfigError: a value cannot be used; the message names file and field.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return GenerationConfig()
    values = read_json_object(path)
    eos_token_ids = HFConfig(values).token_ids("eos_token_id")
    if not recommends:
        return GenerationConfig(eos_token_ids)
    sampling: dict[str, int | float] = {}
    for name in _SAMPLING:
        value = values.get(name)
        if value is None:
            continue
        try:
            checked = getattr(SamplingParams(**{name: value}), name)
        except InvalidRequestError as error:
            raise _refused(path, str(error)) from error
        if checked != getattr(_NOTHING, name):
            sampling[name] = checked
    return GenerationConfig(eos_token_ids, sampling, _max_new_tokens(path, values))


def _max_new_tokens(path: Path, values: dict[str, Any]) -> int | None:
    value = values.get("max_new_tokens")
    if value is not None and (type(value) is not int or not 1 <= value < 2**31):
        raise _refused(path, f"max_new_tokens must be an integer of at least 1, got {value!r}.")
    return value


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: {reason} Correct it, or start with --generation-config none.")
