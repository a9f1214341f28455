"""An engine for a benchmark."""

import time
from dataclasses import asdict

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ContextLengthExceededError
from jaxllm.llm import LLM


def start_engine(config: EngineConfig, longest: int) -> tuple[LLM, float]:
    """The engine and the seconds it took to start.

    Raises:
        ConfigError: the engine cannot start.
        ContextLengthExceededError: it takes fewer than ``longest`` tokens of prompt and answer.
    """
    started = time.perf_counter()
    llm = LLM(**asdict(config))
    seconds = time.perf_counter() - started
    if longest > llm.info.max_model_len:
        raise ContextLengthExceededError(
            f"The benchmark has requests of {longest} tokens, but the engine takes at most "
            f"{llm.info.max_model_len}. Raise --max-model-len, or ask for shorter requests."
        )
    return llm, seconds
