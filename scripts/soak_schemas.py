"""Random JSON schemas through a model with random weights at temperature 1, and what came of them.

    soak_schemas.py [--count 5000] [--seed 1] [--json FILE]

Answers that ended are judged by the package jsonschema. A fifth of the schemas cannot be honoured
and must be refused. Exits with 1 at any answer that does not follow its schema, at any surprise, or
when fewer than nine in ten came to an end within their tokens.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests, wherever this is started from

from scripts.machine import machine  # noqa: E402
from tests.conftest import tiny_hf_config, write_tiny_tokenizer  # noqa: E402
from tests.grammar.rounds import Tally, open_llm, run_round  # noqa: E402

ROUND = 200
MIN_SHARE = 0.9


def soak(count: int, seed: int) -> Tally:
    tally = Tally()
    with tempfile.TemporaryDirectory() as directory:
        model_dir = write_tiny_tokenizer(Path(directory))
        (model_dir / "config.json").write_text(json.dumps(tiny_hf_config("llama")))
        with open_llm(model_dir) as llm, tqdm(total=count, unit="schema") as bar:
            for number in range(-(-count // ROUND)):
                run_round(llm, seed * 10**6 + number, min(ROUND, count - number * ROUND), tally)
                bar.set_postfix(wrong=len(tally.wrong), surprises=len(tally.surprises))
                bar.update(sum(tally.ends.values()) - bar.n)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    beside, began = machine(), time.monotonic()
    tally = soak(args.count, args.seed)
    results = {
        "command": f"scripts/soak_schemas.py --count {args.count} --seed {args.seed}",
        **beside,
        "ends": dict(tally.ends),
        "share_finished": round(tally.share_finished, 4),
        "refused": tally.num_refused,
        "tokens": tally.num_tokens,
        "wrong": tally.wrong,
        "surprises": tally.surprises,
        "seconds": round(time.monotonic() - began, 1),
    }
    text = json.dumps(results, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(bool(tally.wrong or tally.surprises) or tally.share_finished < MIN_SHARE)


if __name__ == "__main__":
    sys.exit(main())
