"""What a measurement module of this folder is given, and how it is run as a process of its own."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    tiny: bool  # shapes for a CPU
    work: Path  # compiled programs, and what one part leaves for another


def main(measure: Callable[[Part], dict[str, Any]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    figures = measure(Part(args.tiny, args.work))
    print(json.dumps(figures, indent=1, default=str))
    args.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
