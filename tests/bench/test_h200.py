"""The run of all figures for one H200: parts, table, and what it reads of dumps and journals.

The measurements themselves are tried with ``python -m scripts.bench.h200 run --tiny``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxllm.journal.file import JournalWriter
from jaxllm.journal.records import Decided, Header
from scripts.bench.h200.journal import occupancy
from scripts.bench.h200.parts import PARTS, PartOfRun, Where
from scripts.bench.h200.rows import ROWS, Row
from scripts.bench.h200.runner import run
from scripts.bench.h200.table import cells, table
from scripts.bench.h200.thunks import sequence
from tests.fakes.plans import make_plan


def _part(code: str, **more: bool) -> PartOfRun:
    def command(where: Where, name: str) -> list[str]:
        return [sys.executable, "-c", code, str(where.result(name))]

    return PartOfRun("one", 1, command, **more)


def _run(part: PartOfRun, tmp_path: Path, **more: float) -> dict[str, dict[str, object]]:
    run([part], Where(True, tmp_path / "work"), tmp_path / "out", "rows", **more)
    path = tmp_path / "out" / "rows.json"
    return json.loads(path.read_text()) if path.exists() else {}


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"x\": 1}')"


@pytest.mark.parametrize(
    ("code", "outcome", "figures"),
    [
        (WRITES, "ran", {"x": 1}),
        ("print('so far'); raise SystemExit(3)", "failed (3)", None),
        ("pass", "failed (1)", None),  # it says that it is done, and has found nothing
    ],
)
def test_a_part_costs_itself_only(tmp_path: Path, code: str, outcome: str, figures: object) -> None:
    one = _run(_part(code), tmp_path)["one"]
    assert (one["outcome"], one["figures"]) == (outcome, figures)
    assert ("so far" in str(one.get("last_words"))) == ("so far" in code)


def test_a_part_may_print_its_figures(tmp_path: Path) -> None:
    code = "print('a {line} before'); print('{\\n \"x\": 2\\n}'); print('one after')"
    assert _run(_part(code, prints=True), tmp_path)["one"]["figures"] == {"x": 2}


def test_what_would_not_end_in_time_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_part(WRITES), tmp_path, seconds=0.5) == {}
    assert "not begun" in capsys.readouterr().out


def test_every_part_can_be_asked_for(tmp_path: Path) -> None:
    where = Where(True, tmp_path, tokenizer=None, gguf=None)
    left_out = {name for name, part in PARTS.items() if part.command(where, name) is None}
    assert left_out == {"parity", "grammar"}


@pytest.mark.parametrize(
    ("row", "measured", "met"),
    [
        (Row("", "", lambda f: 3.0, 4, 2), "3", "yes"),
        (Row("", "", lambda f: 2.0, 4, 2), "2", "yes, and the aim"),
        (Row("", "", lambda f: 4.5, 4, 2), "4.5", "NO"),
        (Row("", "", lambda f: 4.5, 4, 6, "x", least=True), "4.5 x", "yes"),
        (Row("", "", lambda f: 3.0, 4, 6, "x", least=True), "3 x", "NO"),
        (Row("", "", lambda f: 1234.5), "1,234", ""),
        (Row("", "", lambda f: f["absent"], 4), "", "not measured"),
    ],
)
def test_a_row_says_whether_its_target_is_met(row: Row, measured: str, met: str) -> None:
    assert cells(row, {})[4:6] == (measured, met)


def test_the_table_takes_the_last_of_each_figure(tmp_path: Path) -> None:
    """A later run may have measured half of a part."""
    for name, seconds, more in (("one", 70.0, ["warm"]), ("two", 50.0, [])):
        figures = {start: {"first_token_seconds": seconds} for start in ("cold", *more)}
        (tmp_path / name).write_text(json.dumps({"startup": {"figures": figures}}))
    empty = tmp_path / "three"
    empty.write_text(json.dumps({"startup": {"figures": None}}))
    lines = table([tmp_path / "one", tmp_path / "two", empty]).splitlines()
    assert len(lines) == len(ROWS) + 2
    assert "| start | cold | <= 60 | <= 30 | 50 s | yes |  |" in lines
    assert any(line.startswith("| start | warm |") and "| 70 s | NO |" in line for line in lines)


DUMP = """
000: kCopy          a copy
001: kCommandBuffer two kernels
  000: kKernel      wgmma
  001: kGemm        cublas
002: kKernel        beside
"""


def test_thunks_are_counted_inside_of_command_buffers_and_beside(tmp_path: Path) -> None:
    path = tmp_path / "module.thunk_sequence.txt"
    path.write_text(DUMP)
    found = sequence(path)
    assert found["outside"] == {"kCopy": 1, "kCommandBuffer": 1, "kKernel": 1}
    assert found["inside"] == {"kKernel": 1, "kGemm": 1}
    assert (found["thunks"], found["command_buffers"]) == (5, 1)


def test_occupancy_is_tokens_over_the_slots_of_blocks_that_rows_hold(tmp_path: Path) -> None:
    plan, path = make_plan(block_size=4), tmp_path / "journal"
    journal = JournalWriter(path, Header(plan, True), 2**20)

    def step(number: int, rows: list[tuple[int, int, int]], blocks: list[tuple[int, int, int]],
             finished: tuple[int, ...] = ()) -> None:  # fmt: skip
        columns = [np.array(column, "<i4").tobytes() for column in zip(*rows, strict=True)]
        named = dict(zip(("rows", "starts", "num_new_tokens"), columns, strict=True))
        new_blocks = np.array(blocks, "<i4").tobytes()
        journal.write(
            Decided(
                0.0, number, 0, 0, **named, samples=b"", new_blocks=new_blocks,
                finished_rows=finished,
            )
        )  # fmt: skip

    step(0, [(0, 0, 5), (1, 0, 4)], [(0, 0, 1), (0, 1, 2), (1, 0, 3)])  # 9 of 12
    step(1, [(0, 5, 1)], [], finished=(1,))  # 6 of 8
    step(2, [(1, 0, 1)], [(1, 0, 3)])  # another request; row 0 keeps its 6: 7 of 12
    journal.close()
    found = occupancy(path)
    assert found["held_over_allocated"] == pytest.approx(22 / 32)
    assert found["worst_step"] == pytest.approx(7 / 12) and found["most_tokens"] == 9
