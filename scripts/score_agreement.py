"""How alike are the log-probabilities of one text, by the ways there are to ask for them?

    score_agreement.py [MODEL] [--dtype float32 bfloat16] [--settings JSON] [--json FILE]

For an engine of each dtype, with the attention backend that serves the model here: the largest and
the mean difference, and whether the bits are the same, of

- ``prompt_logprobs`` of texts together and asked for again: the same way, of each text alone, by an
  engine with smaller chunks, and there beside requests that draw tokens. On a CPU they must have
  the same bits, on other devices when asked the same way (exit code 1 if not);
- what the engine told while it drew tokens, and ``prompt_logprobs`` of these tokens;
- ``logprob_fn`` in float32 (with products as exact) and in bfloat16, and ``prompt_logprobs``.
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
from jaxllm.bench.report import make_device_report, write_report
from jaxllm.outputs import PositionLogprobs
from jaxllm.score import logprob_fn

TEXT = Path(__file__).parents[1] / "CONTRIBUTING.md"
TEXTS, LENGTH, DRAWN = 4, 225, 32  # tokens
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=DRAWN, logprobs=0, ignore_eos=True)
CHUNK = 64
DTYPES = ("float32", "bfloat16")
# Without what earlier requests left in the cache every text is computed each time.
ENGINE = {"max_model_len": 512, "max_num_seqs": 16, "enable_prefix_caching": False}
SMALL_CACHE = {"num_gpu_blocks_override": 129}  # two engines, one after the other


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    settings = ENGINE | SMALL_CACHE | options.settings
    found = {dtype: agreement(options.model, dtype, settings) for dtype in options.dtype}
    report = make_device_report({"model": options.model, "settings": settings, "engine": found})
    report["command"] = ["scripts/score_agreement.py", *sys.argv[1:]]
    print(json.dumps(report, indent=2))
    write_report(report, options.json)
    return 0 if all(as_promised(engine["prompt_logprobs"]) for engine in found.values()) else 1


def as_promised(again: dict[str, dict[str, Any]]) -> bool:
    asked = again if jax.default_backend() == "cpu" else ("the same way",)
    return all(again[how]["same_bits"] for how in asked)


def agreement(model: str, dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    with LLM(model, dtype=dtype, **settings) as llm:
        backend = llm.core.scheduler.plan.attention_reason
        ids = llm.get_tokenizer().encode(TEXT.read_text())
        texts = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(TEXTS)]
        together = scores(llm, texts)
        again = {"the same way": scores(llm, texts)}
        again["alone"] = [scores(llm, [text])[0] for text in texts]
        answers = llm.generate(texts, GREEDY, use_tqdm=False)
        whole = [[*text, *drawn_of(answer)] for text, answer in zip(texts, answers, strict=True)]
        read = [row[-DRAWN:] for row in scores(llm, whole)]
    with LLM(model, dtype=dtype, **(settings | {"max_num_batched_tokens": CHUNK})) as llm:
        again["in smaller chunks"] = scores(llm, texts)
        again["beside requests that draw"] = scores(llm, texts, [text[:1] for text in texts])
    return {
        "attention": backend,
        "prompt_logprobs": {how: apart(rows, together) for how, rows in again.items()},
        "told_while_drawing": apart([told(answer) for answer in answers], read),
        "logprob_fn": {kind: apart(by_function(model, kind, texts), together) for kind in DTYPES},
    }


def by_function(model: str, dtype: str, texts: Sequence[list[int]]) -> list[np.ndarray]:
    fn = logprob_fn(model, dtype=dtype)
    with jax.default_matmul_precision("highest"):  # GPUs have faster ones for float32
        scored = jax.jit(fn)
        return [np.asarray(scored(fn.params, jnp.asarray(text))) for text in texts]


def scores(
    llm: LLM, prompts: Sequence[list[int]], drawing: Sequence[list[int]] = ()
) -> list[np.ndarray]:
    """float32 of each prompt's tokens but the first. ``drawing``: prompts that go first, and whose
    answers are drawn meanwhile.
    """
    params = [GREEDY] * len(drawing) + [SCORED] * len(prompts)
    outputs = llm.generate([*drawing, *prompts], params, use_tqdm=False)[len(drawing) :]
    return [of_tokens(output.prompt_logprobs or (), output.prompt_token_ids) for output in outputs]


def drawn_of(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def told(output: RequestOutput) -> np.ndarray:
    return of_tokens(output.outputs[0].logprobs or (), drawn_of(output))


def of_tokens(positions: Sequence[PositionLogprobs | None], token_ids: Sequence[int]) -> np.ndarray:
    pairs = zip(positions, token_ids, strict=True)
    return np.array([at[token].logprob for at, token in pairs if at is not None], np.float32)


def apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[str, Any]:
    one, other = np.concatenate(list(ours)), np.concatenate(list(theirs))
    difference = np.abs(one - other)
    return {
        "same_bits": bool((one == other).all()),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }


if __name__ == "__main__":
    sys.exit(main())
