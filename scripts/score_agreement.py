"""How alike are the log-probabilities of one text, by the ways there are to ask for them?

    score_agreement.py [MODEL] [--json FILE]

In float32 and in bfloat16: ``prompt_logprobs`` of texts together, of each alone and of an engine
with smaller chunks, which must have the same bits (exit code 1 if not); what the engine told while
it drew the tokens; and ``logprob_fn``. Of the last two the largest difference and the mean.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import LLM, RequestOutput, SamplingParams
from jaxllm.outputs import PositionLogprobs
from jaxllm.score import logprob_fn

TEXT = Path(__file__).parents[1] / "CONTRIBUTING.md"
TEXTS, LENGTH, DRAWN = 4, 225, 32  # tokens
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
CHUNK = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {dtype: agreement(options.model, dtype) for dtype in ("float32", "bfloat16")}
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(found["asked_again_same_bits"] for found in report.values()) else 1


def agreement(model: str, dtype: str) -> dict[str, Any]:
    # Without what earlier requests left in the cache every text is computed each time.
    settings: dict[str, Any] = {"dtype": dtype, "max_model_len": 512}
    settings["enable_prefix_caching"] = False
    with LLM(model, **settings) as llm:
        ids = llm.get_tokenizer().encode(TEXT.read_text())
        texts = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(TEXTS)]
        together = scores(llm, texts)
        again = [scores(llm, [text])[0] for text in texts]
        greedy = SamplingParams(temperature=0.0, max_tokens=DRAWN, logprobs=0, ignore_eos=True)
        answers = llm.generate(texts, greedy, use_tqdm=False)
        whole = [[*text, *drawn_of(answer)] for text, answer in zip(texts, answers, strict=True)]
        read = [row[-DRAWN:] for row in scores(llm, whole)]
    with LLM(model, max_num_batched_tokens=CHUNK, **settings) as llm:
        again += scores(llm, texts)
    fn = logprob_fn(model, dtype=dtype)
    scored = jax.jit(fn)
    by_function = [np.asarray(scored(fn.params, jnp.asarray(text))) for text in texts]
    pairs = zip(again, together * 2, strict=True)
    return {
        "asked_again_same_bits": all(bool((a == b).all()) for a, b in pairs),
        "told_while_drawing": apart([told(answer) for answer in answers], read),
        "logprob_fn": apart(by_function, together),
    }


def scores(llm: LLM, prompts: Sequence[list[int]]) -> list[np.ndarray]:
    """float32 of each prompt's tokens but the first."""
    outputs = llm.generate(prompts, SCORED, use_tqdm=False)
    return [of_tokens(output.prompt_logprobs or (), output.prompt_token_ids) for output in outputs]


def drawn_of(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def told(output: RequestOutput) -> np.ndarray:
    return of_tokens(output.outputs[0].logprobs or (), drawn_of(output))


def of_tokens(positions: Sequence[PositionLogprobs | None], token_ids: Sequence[int]) -> np.ndarray:
    pairs = zip(positions, token_ids, strict=True)
    return np.array([at[token].logprob for at, token in pairs if at is not None], np.float32)


def apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[str, float]:
    difference = np.abs(np.concatenate(list(ours)) - np.concatenate(list(theirs)))
    return {"largest": float(difference.max()), "mean": float(difference.mean())}


if __name__ == "__main__":
    sys.exit(main())
