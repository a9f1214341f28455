"""Many streams at once for a while: each whole and right, and how evenly the tokens came.

    soak_streams.py [--streams 256] [--seconds 60] [--period-ms 50] [--json FILE]

The engine is a fake one that gives every stream one token per period. Exits with 1 if a stream is
not whole, or if the 99th percentile of the gaps between its tokens is more than twice the period,
or twice what eight streams get, whichever is longer.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests, wherever this is started from

from scripts.machine import machine  # noqa: E402
from tests.conftest import write_tiny_tokenizer  # noqa: E402
from tests.server.command import serve_command  # noqa: E402
from tests.server.many_streams import measure  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Many streams at once.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--period-ms", type=float, default=50.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    beside = machine()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer_dir = write_tiny_tokenizer(Path(directory))
        flags = ("--max-model-len", "1000000", "--max-num-seqs", str(args.streams))
        with serve_command(tokenizer_dir, f"paced:{args.period_ms}", *flags) as command:
            found = measure(command, args.streams, args.seconds, args.period_ms / 1000)
    command_line = f"scripts/soak_streams.py --streams {args.streams} --seconds {args.seconds:g}"
    command_line += f" --period-ms {args.period_ms:g}"
    report = {"command": command_line, **beside, **asdict(found)}
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    found.check()


if __name__ == "__main__":
    main()
