"""What grammars cost: mask time per row, and a step of constrained rows beside one of free rows.

    grammar_cost.py [--rows 64] [--steps 60] [--repeats 3] [--model DIR] [--settings JSON]
        [--switch-interval SECONDS] [--json FILE]

The vocabulary and the shapes are those of --model (default: smollm2-135m), whose weights do not
matter; --settings has EngineConfig fields beside it, such as a tokenizer for dummy weights. All
rows follow one JSON schema, at temperature 1. Free rows ask for min_tokens, so that both kinds run
the same sampler; rounds of both kinds alternate, so that other load meets both. Answers of --steps
tokens less answers of SHORT, so that prompts and the first use of a grammar count apart.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxllm import LLM, SamplingParams, StructuredOutputsParams  # noqa: E402
from jaxllm.bench.report import write_report  # noqa: E402
from jaxllm.grammar.checker import GrammarChecker  # noqa: E402
from jaxllm.grammar.compiler import GrammarCompiler  # noqa: E402
from jaxllm.grammar.ll_tokenizer import load_ll_tokenizer  # noqa: E402
from jaxllm.grammar.matcher import GrammarMatcher, fill_masks  # noqa: E402
from jaxllm.messages import ModelInfo  # noqa: E402
from jaxllm.sampling.token_mask import mask_words  # noqa: E402
from scripts.bench.host_phases import HostPhases  # noqa: E402

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 100, "maxLength": 400},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age", "tags", "email"],
    "additionalProperties": False,
}
SPEC = StructuredOutputsParams(json=PERSON)
SHORT = 4  # tokens


def mask_cost(info: ModelInfo, rows: int, steps: int) -> dict[str, Any]:
    """Microseconds a row and step: each row's next token is drawn evenly from what is allowed."""
    where = (info.tokenizer_dir, info.vocab_size, info.eos_token_ids)
    checker = GrammarChecker(*where)
    began = time.perf_counter()
    grammar = checker.submit(SPEC).result()
    first_check = time.perf_counter() - began
    checker.close()
    compiler = GrammarCompiler(lambda: load_ll_tokenizer(*where))
    compiler.compile(grammar)
    began = time.perf_counter()
    compiler.compile(grammar)
    compile_seconds = time.perf_counter() - began
    matchers = [GrammarMatcher(compiler, grammar) for _ in range(rows)]
    mask = np.full((rows, mask_words(info.vocab_size)), -1, np.int32)
    rng, times = np.random.default_rng(0), []
    for _ in range(steps):
        began = time.perf_counter()
        fill_masks(list(enumerate(matchers)), mask)
        times.append((time.perf_counter() - began) / rows * 1e6)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        for matcher, row in zip(matchers, bits, strict=True):
            matcher.extend((int(rng.choice(np.flatnonzero(row))),))
    return {
        "first_check_ms": round(first_check * 1e3, 1),
        "compile_ms": round(compile_seconds * 1e3, 2),
        "fill_us_per_row_median": round(statistics.median(times), 1),
        "fill_us_per_row_max": round(max(times), 1),
    }


def step_cost(llm: LLM, rows: int, steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds a step with all rows decoding, and where the host's time goes."""
    seconds: dict[str, list[float]] = {"free": [], "constrained": []}
    begin: dict[str, list[float]] = {name: [] for name in seconds}
    host: dict[str, dict[str, int]] = {}
    phases = HostPhases()
    phases.watch(llm.core)
    for _ in range(repeats + 1):
        for name in seconds:
            short, first = timed(llm, rows, kind(name, SHORT))
            phases.take()
            took, all_steps = timed(llm, rows, kind(name, steps))
            host[name] = phases.take()
            seconds[name].append((took - short) / (all_steps - first))
            begin[name].append(short)
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "free_step_ms": round(middle["free"] * 1e3, 2),
        "constrained_step_ms": round(middle["constrained"] * 1e3, 2),
        "ratio": round(middle["constrained"] / middle["free"], 3),
        f"first_{SHORT}_tokens_ms": {
            name: round(statistics.median(times[1:]) * 1e3, 1) for name, times in begin.items()
        },
        "host_us": host,  # of the last round
    }


def kind(name: str, steps: int) -> SamplingParams:
    if name == "free":
        return SamplingParams(temperature=1.0, max_tokens=steps, min_tokens=steps)
    return SamplingParams(temperature=1.0, max_tokens=steps, structured_outputs=SPEC)


def timed(llm: LLM, rows: int, params: SamplingParams) -> tuple[float, int]:
    """Seconds and steps."""
    before, began = llm.stats().num_steps, time.perf_counter()
    llm.generate(["A person:"] * rows, params, use_tqdm=False)
    return time.perf_counter() - began, llm.stats().num_steps - before


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument(
        "--switch-interval",
        type=float,
        default=sys.getswitchinterval(),
        metavar="SECONDS",
        help="after which a thread has to give Python's lock to one that waits",
    )
    args = parser.parse_args()
    sys.setswitchinterval(args.switch_interval)
    own = {"model": args.model, "max_num_seqs": args.rows, "max_model_len": 256}
    with LLM(**(own | args.settings)) as llm:
        results = {
            "command": f"scripts/bench/grammar_cost.py --rows {args.rows} --steps {args.steps} "
            f"--repeats {args.repeats} --model {args.model}",
            "python": platform.python_version(),
            "switch_interval": args.switch_interval,
            "vocab_size": llm.info.vocab_size,
            "mask": mask_cost(llm.info, args.rows, args.steps),
            "step": step_cost(llm, args.rows, args.steps, args.repeats),
        }
    print(json.dumps(results, indent=2))
    write_report(results, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
