"""Does a request's answer depend on its company? Runs 32 requests together and each one alone.

    batch_invariance.py [MODEL] [--dtype float32] [--json FILE]

Mixed lengths, mixed sampling parameters, and a KV cache so small that requests are preempted. In
float32 every answer must be the same (exit code 1 if not). In bfloat16 the bits of a matrix product
may depend on the number of rows; the share of requests and tokens that differ is printed.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from jaxllm import LLM, RequestOutput, SamplingParams

TEXT = (
    "The harbour was quiet before dawn. Fishermen mended their nets by lamplight and spoke of the "
    "weather, of prices, and of the year the sea had frozen as far as the lighthouse. "
)


def make_requests(count: int, seed: int) -> list[tuple[str, SamplingParams]]:
    rng = random.Random(seed)
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "min_tokens": 10, "stop": ["."]},
    ]
    requests: list[tuple[str, SamplingParams]] = []
    for index in range(count):
        start = rng.randrange(len(TEXT))
        prompt = (TEXT * 8)[start : start + rng.randrange(20, 900)]
        params = variants[index % len(variants)]
        max_tokens = rng.randrange(12, 49)
        requests.append((prompt, SamplingParams(seed=index, max_tokens=max_tokens, **params)))
    return requests


def same_tokens(together: RequestOutput, alone: RequestOutput) -> tuple[int, int]:
    """(tokens of the common beginning, tokens in all)"""
    ours, theirs = together.outputs[0].token_ids, alone.outputs[0].token_ids
    pairs = zip(ours, theirs, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return common, max(len(ours), len(theirs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=28, help="KV-cache blocks of 64 tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=512,
        max_num_seqs=16,
        num_gpu_blocks_override=options.blocks,
        enable_prefix_caching=False,  # else what is asked alone would find what company computed
    )
    requests = make_requests(options.requests, seed=0)
    prompts, params = [p for p, _ in requests], [s for _, s in requests]
    together = llm.generate(prompts, params)
    preemptions = llm.stats().num_preemptions
    alone = [llm.generate(prompt, one, use_tqdm=False)[0] for prompt, one in requests]
    counts = [same_tokens(a, b) for a, b in zip(together, alone, strict=True)]
    different = sum(common < total for common, total in counts)
    tokens_different = sum(total - common for common, total in counts)
    report = {
        "model": options.model,
        "dtype": options.dtype,
        "requests": len(requests),
        "preemptions": preemptions,
        "requests_that_differ": different / len(requests),
        "tokens_after_a_difference": tokens_different / sum(total for _, total in counts),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if preemptions == 0:
        print("error: nothing was preempted; lower --blocks", file=sys.stderr)
        return 2
    return 1 if options.dtype == "float32" and different else 0


if __name__ == "__main__":
    sys.exit(main())
