"""What feeding forced text at once saves: a schema with long keys, with --jump-forward and not.

    jump_forward.py [--rows 8] [--repeats 3] [--model DIR] [--json FILE]

Answers are drawn greedily; both engines take turns, so that other load meets both. Seconds are
medians over the turns.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxllm import LLM, SamplingParams, StructuredOutputsParams  # noqa: E402
from jaxllm.bench.report import check_writable, make_client_report, write_report  # noqa: E402

ORDER = {
    "type": "object",
    "properties": {
        "customer_identification_number": {"type": "integer", "minimum": 1, "maximum": 9999},
        "shipping_address_city": {"enum": ["Amsterdam", "Copenhagen", "Reykjavik"]},
        "payment_method_description": {"enum": ["credit card", "bank transfer", "on delivery"]},
        "delivery_instructions_for_driver": {"type": "string", "maxLength": 24},
        "is_recurring_customer_order": {"type": "boolean"},
    },
    "required": [
        "customer_identification_number",
        "shipping_address_city",
        "payment_method_description",
        "delivery_instructions_for_driver",
        "is_recurring_customer_order",
    ],
    "additionalProperties": False,
}
PROMPT = "Write the next order as JSON. Order number"


def measure(llm: LLM, rows: int) -> dict[str, Any]:
    spec = StructuredOutputsParams(json=ORDER)
    params = SamplingParams(temperature=0.0, max_tokens=200, structured_outputs=spec)
    prompts = [f"{PROMPT} {row}:" for row in range(rows)]
    first, began = llm.stats().num_steps, time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    steps = llm.stats().num_steps - first
    return {"steps": steps, "tokens": tokens, "seconds": seconds, "tokens_s": tokens / seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    check_writable(args.json)
    sizes = {"dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 128}
    engines = {
        name: LLM(args.model, jump_forward=on, max_num_seqs=args.rows, **sizes)
        for name, on in (("on", True), ("off", False))
    }
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for turn in range(args.repeats + 1):  # the first warms up
        for name, llm in engines.items():
            found = measure(llm, args.rows)
            turns[name] += [found] if turn else []
    figures: dict[str, Any] = {"rows": args.rows}
    for name, found in turns.items():
        figures[name] = {key: statistics.median(turn[key] for turn in found) for key in found[0]}
        print(name, {key: round(value, 2) for key, value in figures[name].items()})
    write_report(make_client_report(figures), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
