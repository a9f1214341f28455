"""Every figure that is promised for one H200, measured in one documented run.

    python -m scripts.bench.h200 list
    python -m scripts.bench.h200 run [PART ...] --out DIR [--label NAME] [--work DIR]
        [--seconds N] [--tokenizer DIR] [--gguf FILE] [--reference-python PYTHON] [--tiny]
    python -m scripts.bench.h200 table [FILE ...]

``run`` executes parts in the order given (default: all; ``list`` shows them with the seconds they
are expected to take). ``startup`` must be the first on a fresh machine, with an empty --work: it is
the cold start, and the programs it compiles serve all others. ``table`` prints every row with its
target from the files of one or more runs; of a part that ran twice the last file counts.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from scripts.bench.h200.parts import PARTS, Where
from scripts.bench.h200.runner import run
from scripts.bench.h200.settings import ROOT
from scripts.bench.h200.table import table

RESULTS = ROOT / "scripts" / "bench" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    run_parser = commands.add_parser("run")
    run_parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}")
    run_parser.add_argument("--out", type=Path, required=True)
    run_parser.add_argument("--label", default="h200-rows", help="name of the two files in --out")
    run_parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "jaxllm-h200",
        help="programs and results that later parts use (%(default)s)",
    )  # fmt: skip
    run_parser.add_argument(
        "--seconds", type=float, default=float("inf"),
        help="begin no part that is not expected to end within them",
    )  # fmt: skip
    run_parser.add_argument("--tokenizer", type=Path, help="directory; for grammar")
    run_parser.add_argument("--gguf", type=Path, help="of the default model; for parity")
    run_parser.add_argument(
        "--reference-python", type=Path, default=Path(sys.executable),
        help="with torch and transformers (%(default)s)",
    )  # fmt: skip
    run_parser.add_argument("--tiny", action="store_true", help="a shape for a CPU")
    table_parser = commands.add_parser("table")
    table_parser.add_argument("files", nargs="*", type=Path, help="default: h200-rows*.json")
    args = parser.parse_args()
    if args.command == "list":
        for part in PARTS.values():
            print(f"{part.name:22} {part.seconds:4} s")
        print(f"{'all':22} {sum(part.seconds for part in PARTS.values()):4} s")
        return 0
    if args.command == "table":
        print(table(args.files or sorted(RESULTS.glob("h200-rows*.json"), key=_age)))
        return 0
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    chosen = [PARTS[name] for name in args.parts or PARTS]
    where = Where(args.tiny, args.work.resolve(), args.tokenizer, args.gguf, args.reference_python)
    return 0 if run(chosen, where, args.out, args.label, args.seconds) else 1


def _age(path: Path) -> tuple[int, str]:
    """Numbered by the run: 10 comes after 9."""
    return len(path.stem), path.stem


if __name__ == "__main__":
    sys.exit(main())
