"""Does this device's fast path agree with the float32 reference? Greedy tokens of 20 real prompts.

    greedy_parity.py [MODEL] [--dtype bfloat16] [--json FILE]

Teacher-forced: the reference's own 64 tokens are fed, and at every position where its two best
logits are more than 0.5 apart our likeliest token must be its token (exit code 1 if not).
Free-running: our own 64 tokens, and the share that differ from the reference's. The reference is
tests/golden/smollm2-135m.npz, recorded with transformers in float32 (scripts/parity.py).
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


def free_running(llm: LLM, prompts: list[list[int]], greedy: np.ndarray) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_tokens=greedy.shape[1], ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ours = np.array([output.outputs[0].token_ids for output in outputs])
    different = ours != greedy
    return {
        "tokens": int(greedy.size),
        "tokens_different": int(different.sum()),
        "share_different": round(float(different.mean()), 4),
        "prompts_different": int(different.any(axis=1).sum()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    golden = np.load(GOLDEN)
    tokens, greedy = golden["tokens"], golden["greedy"]
    prompts = [tokens[start:stop].tolist() for start, stop in pairwise(golden["offsets"])]
    llm = LLM(options.model, dtype=options.dtype, max_model_len=1024)
    report = {
        "benchmark": "greedy parity",
        "model": options.model,
        "dtype": options.dtype,
        "teacher_forced": forced(llm, prompts, greedy, golden["margins"] > SURE),
        "free_running": free_running(llm, prompts, greedy),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(report["teacher_forced"]["wrong_where_sure"] > 0)


if __name__ == "__main__":
    sys.exit(main())
