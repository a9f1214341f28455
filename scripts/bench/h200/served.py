"""Workload B over HTTP: ``jaxllm serve``, and 200 streams at once from this process's client."""

from typing import Any

from jaxllm.bench.serve import ServeBenchOptions, run_serve
from jaxllm.bench.server_process import server_process
from jaxllm.config.engine import EngineConfig
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import with_words

STREAMS = 200


def measure(part: Part) -> dict[str, Any]:
    config = EngineConfig(**with_words(part.tiny, part.work))
    with server_process(config, timeout_s=300) as server:
        options = ServeBenchOptions(
            base_url=server.url,
            workload="random" if part.tiny else "b",
            num_prompts=8 if part.tiny else None,
            input_len=16 if part.tiny else None,
            output_len=8 if part.tiny else None,
            vocab_size=128_256,
            max_concurrency=4 if part.tiny else STREAMS,
            ignore_eos=True,
        )
        return run_serve(options)


if __name__ == "__main__":
    main(measure)
