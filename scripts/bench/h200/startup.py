"""From nothing to the first token over HTTP: with an empty directory of programs, and again with
those that the first start left there, which every later part uses too.
"""

from pathlib import Path
from typing import Any

from jaxllm.bench.startup import measure_start
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import engine

TIMEOUT_S = 300.0


def measure(part: Part) -> dict[str, Any]:
    config = EngineConfig(**engine(part.tiny, part.work))
    directory = Path(config.compilation_cache_dir or "")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} holds programs: a cold start needs another --work.")
    return {name: measure_start(config, TIMEOUT_S) for name in ("cold", "warm")}


if __name__ == "__main__":
    main(measure)
