"""From the journal of workload B: how full the blocks were that requests held, what
``scripts/simulate.py --trace --cost`` predicts for that run from the costs of ``bench latency``,
and of which steps it was made, so that a prediction that is off can be told why.
"""

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jaxllm.errors import JaxLLMError
from jaxllm.journal.file import read_journal
from jaxllm.journal.records import Decided, int32s
from jaxllm.simulation.capacity import predict, summarise, with_rows
from jaxllm.simulation.cost import cost_of_journal, read_cost
from jaxllm.simulation.trace import journal_plan, journal_times, read_trace
from scripts.bench.h200.part import Part, main

JOURNAL = "workload-b.journal"


def measure(part: Part) -> dict[str, Any]:
    path = part.work / JOURNAL
    return {
        "occupancy": occupancy(path),
        "capacity": capacity(path, part.work / "latency.json"),
        "steps": msgspec.to_builtins(cost_of_journal(path).programs),
    }


def occupancy(path: Path) -> dict[str, float]:
    """Tokens that requests had in the cache at the end of a step, over the slots of the blocks they
    held: of all steps together, and of the worst.
    """
    block_size = journal_plan(path).block_size
    blocks: dict[int, set[int]] = defaultdict(set)  # by row
    tokens: dict[int, int] = {}
    shares: list[tuple[int, int]] = []
    for record in read_journal(path):
        if not isinstance(record, Decided):
            continue
        for row in record.finished_rows:
            blocks.pop(row, None)
            tokens.pop(row, None)
        for row, index, _ in int32s(record.new_blocks).reshape(-1, 3).tolist():
            blocks[row].add(index)
        ends = int32s(record.starts) + int32s(record.num_new_tokens)
        tokens |= zip(int32s(record.rows).tolist(), ends.tolist(), strict=True)
        shares.append((sum(tokens.values()), block_size * sum(map(len, blocks.values()))))
    held, slots = np.array(shares).T
    return {
        "steps": len(shares),
        "held_over_allocated": float(held.sum() / slots.sum()),
        "worst_step": float((held / slots).min()),
        "most_tokens": int(held.max()),
    }


def capacity(path: Path, costs: Path) -> dict[str, Any]:
    """The run as it was and as predicted; why not, where there are no costs."""
    try:
        table = read_cost(costs)
    except JaxLLMError as error:
        return {"why_not": error.message}
    rows = journal_plan(path).max_num_seqs
    measured = asdict(summarise(journal_times(path), rows))
    predicted = asdict(predict(with_rows(table.plan, rows), table, read_trace(path)))
    names = [name for name in measured if measured[name] and not name.startswith(("num_", "max_"))]
    off = {name: (predicted[name] - measured[name]) / measured[name] for name in names}
    return {"measured": measured, "predicted": predicted, "off": off}


if __name__ == "__main__":
    main(measure)
