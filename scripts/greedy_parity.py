"""Does this device's fast path agree with the float32 reference? Greedy tokens of 20 real prompts.

    greedy_parity.py [MODEL] [--dtype bfloat16] [--compilation-cache-dir DIR] [--json FILE]

Teacher-forced: the reference's own 64 tokens are fed, and at every position where its two best
logits are more than 0.5 apart our likeliest token must be its token (exit code 1 if not).
Through hits: the same, but each position is a request of its own, whose prefix is in the cache.
Free-running: our own 64 tokens, and the share that differ from the reference's.
Preempted: the same in a cache so small that requests must make way. Where an answer leaves the
reference's for the first time, the reference must be unsure (exit code 1 if not).

The reference is tests/golden/smollm2-135m.npz, recorded with transformers in float32
(scripts/parity.py).
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import LLM, SamplingParams

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "smollm2-135m.npz"
LONGEST = 1024  # tokens
FEW_BLOCKS = 18  # of 64 tokens, one of which nobody owns: the 20 answers end in two each
SURE = 0.5  # the reference's top-2 margin from which its token is beyond doubt


def forced(
    llm: LLM, prompts: list[list[int]], greedy: np.ndarray, sure: np.ndarray
) -> dict[str, int]:
    """Our likeliest token after each of the reference's."""
    whole = [p + answer[:-1].tolist() for p, answer in zip(prompts, greedy, strict=True)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, logprobs=1)
    outputs = llm.generate(whole, params, use_tqdm=False)
    likeliest = np.empty_like(greedy)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        scored = output.prompt_logprobs or []
        best = [
            next(i for i, entry in position.items() if entry.rank == 1)
            for position in scored[len(prompt) :]
            if position is not None
        ]
        likeliest[index] = [*best, output.outputs[0].token_ids[0]]
    wrong = likeliest != greedy
    return {
        "positions": int(greedy.size),
        "sure_positions": int(sure.sum()),
        "wrong_where_sure": int((wrong & sure).sum()),
        "wrong": int(wrong.sum()),
    }


def through_hits(
    llm: LLM, prompts: list[list[int]], greedy: np.ndarray, sure: np.ndarray
) -> dict[str, int]:
    """Call it after ``forced``, which leaves the prefixes in the cache."""
    prefixes = [
        prompt + answer[:length].tolist()
        for prompt, answer in zip(prompts, greedy, strict=True)
        for length in range(len(answer))
    ]
    outputs = llm.generate(prefixes, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    ours = np.array([output.outputs[0].token_ids[0] for output in outputs]).reshape(greedy.shape)
    cached = np.array([output.num_cached_tokens for output in outputs]).reshape(greedy.shape)
    wrong = ours != greedy
    return {
        "positions": int(greedy.size),
        "positions_with_hits": int((cached > 0).sum()),
        "tokens_from_the_cache": int(cached.sum()),
        "wrong_where_sure": int((wrong & sure).sum()),
        "wrong": int(wrong.sum()),
    }


def free_running(
    llm: LLM, prompts: list[list[int]], greedy: np.ndarray, sure: np.ndarray
) -> dict[str, Any]:
    before = llm.stats().num_preemptions
    params = SamplingParams(temperature=0.0, max_tokens=greedy.shape[1], ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ours = np.array([output.outputs[0].token_ids for output in outputs])
    different = ours != greedy
    alike = np.cumsum(different, axis=1) == 0
    leaves = different & (np.cumsum(different, axis=1) == 1)
    return {
        "tokens": int(greedy.size),
        "tokens_different": int(different.sum()),
        "share_different": round(float(different.mean()), 4),
        "prompts_different": int(different.any(axis=1).sum()),
        "tokens_up_to_first_difference": int(alike.sum()),
        "wrong_where_sure": int((leaves & sure).sum()),
        "preemptions": llm.stats().num_preemptions - before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compilation-cache-dir")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    golden = np.load(GOLDEN)
    tokens, greedy = golden["tokens"], golden["greedy"]
    prompts = [tokens[start:stop].tolist() for start, stop in pairwise(golden["offsets"])]
    common = {"model": options.model, "dtype": options.dtype, "max_num_seqs": len(prompts)}
    common |= {"max_model_len": LONGEST, "compilation_cache_dir": options.compilation_cache_dir}
    case = (prompts, greedy, golden["margins"] > SURE)
    found: dict[str, dict[str, Any]] = {}
    with LLM(**common) as llm:
        found["teacher_forced"] = forced(llm, *case)
        found["through_hits"] = through_hits(llm, *case)
        found["free_running"] = free_running(llm, *case)
    with LLM(**common, num_gpu_blocks_override=FEW_BLOCKS) as llm:
        found["preempted"] = free_running(llm, *case)
    report = {"benchmark": "greedy parity", "model": options.model, "dtype": options.dtype, **found}
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    unproven = (
        not found["preempted"]["preemptions"] or not found["through_hits"]["tokens_from_the_cache"]
    )
    return int(unproven or any(part["wrong_where_sure"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
