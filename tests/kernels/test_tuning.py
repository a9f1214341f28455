"""Tuned configs: the file's format, the look-up, the files that are shipped, and the sweep."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.attention import decode_specs, prefill_specs
from pallas_kernels.bench.operation import Operation, Timed
from pallas_kernels.bench.prefill import PrefillOperation
from pallas_kernels.bench.suite import OPERATIONS
from pallas_kernels.tuning.table import (
    FOLDER,
    TunedConfig,
    TuningTable,
    load_table,
    slug,
    tuned,
)
from scripts import tune_kernels

SHIPPED = sorted(FOLDER.glob("*.json"))


@dataclass(frozen=True)
class Config:
    split: int = 8
    stages: int = 2
    turns: bool = True

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError("stages must be positive")


ENTRY = TunedConfig("op", {"stages": 2}, {"stages": 4}, {"big": 1.5}, 1.25, {"commit": "abc"})


def write(folder: Path, *entries: TunedConfig) -> str:
    """A file for a device of its own: tables are cached by device and folder."""
    table = TuningTable("NVIDIA X1", entries)
    (folder / "nvidia-x1.json").write_text(table.to_json())
    return table.device


def test_the_name_of_a_device_s_file() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA GH200 480GB/a") == "nvidia-gh200-480gb-a"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    device = write(tmp_path, ENTRY)
    assert load_table(device, tmp_path) == TuningTable(device, (ENTRY,))


def test_an_entry_replaces_its_fields_and_no_others(tmp_path: Path) -> None:
    device = write(tmp_path, ENTRY)
    assert tuned("op", device, Config(split=16), tmp_path) == Config(split=16, stages=4)


def test_an_entry_holds_only_for_the_default_it_was_compared_with(tmp_path: Path) -> None:
    other = TunedConfig("op", {"stages": 3}, {"stages": 9}, {}, None, {})
    device = write(tmp_path, ENTRY, other)
    assert tuned("op", device, Config(stages=3), tmp_path).stages == 9
    assert tuned("op", device, Config(stages=5), tmp_path).stages == 5
    assert tuned("other op", device, Config(), tmp_path) == Config()


def test_an_entry_for_some_shapes_goes_before_one_for_all(tmp_path: Path) -> None:
    small = dataclasses.replace(ENTRY, config={"stages": 8}, where={"page": 16})
    device = write(tmp_path, small, ENTRY)
    for where, stages in (({"page": 16, "x": 1}, 8), ({"page": 64}, 4), (None, 4)):
        assert tuned("op", device, Config(), tmp_path, where=where).stages == stages


def test_small_pages_of_the_h200_are_dealt_out_by_four_warps() -> None:
    prefill = PrefillOperation()
    for spec in (*prefill_specs.SPEED_OTHERS, *prefill_specs.SPEED):
        default = prefill.default(spec)
        config = tuned("prefill", "NVIDIA H200", default, where=prefill.where(spec))
        assert config.issuers == (4 if spec.page == 16 and spec.dim == 128 else 1), spec.name


def test_no_file_means_the_default(tmp_path: Path) -> None:
    assert tuned("op", "NVIDIA X1", Config(), tmp_path) == Config()
    assert tuned("op", "", Config(), tmp_path) == Config()


def _with(**changes: Any) -> dict[str, Any]:
    table = json.loads(TuningTable("NVIDIA X1", (ENTRY,)).to_json())
    table["tuned"][0] |= changes
    return table


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (_with(speed=1), ("unknown keys ['speed']", "tuned[0]")),
        (_with(config={"stages": "4"}), ("stages must be int, not '4'",)),
        (_with(config={"stages": True}), ("stages must be int, not True",)),
        (_with(config={"stages": 0}), ("stages must be positive",)),
        (_with(config={"stags": 4}, replaces={"stags": 2}), ("Config has no stags",)),
        (_with(config={"stages": 4, "split": 9}), ("the same fields",)),
        (_with(microseconds={"big": None}), ("microseconds['big']", "float")),
        ({"tuned": []}, ("lacks ['device']",)),
        ([], ("must be dict",)),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, table: Any, words: tuple[str, ...]
) -> None:
    (tmp_path / "nvidia-x1.json").write_text(json.dumps(table))
    with pytest.raises(ValueError) as error:
        tuned("op", "NVIDIA X1", Config(), tmp_path)
    for word in (*words, "nvidia-x1.json", "scripts/tune_kernels.py"):
        assert word in str(error.value)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "nvidia-x1.json").write_text("{")
    with pytest.raises(ValueError, match=r"nvidia-x1\.json"):
        load_table("NVIDIA X1", tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_fits_the_kernels(path: Path) -> None:
    """Its configs suit every shape that is tested or timed, and fix no bits of attention."""
    table = TuningTable.from_json(path.read_text())
    assert slug(table.device) == path.stem
    assert {entry.op for entry in table.tuned} <= set(OPERATIONS)
    for entry in table.tuned:
        assert not entry.config.keys() & {"split_tokens", "chunk_tokens", "block", "block_kv"}
    more = {"decode": decode_specs.MIXED, "prefill": prefill_specs.MIXED}
    for name, operation in OPERATIONS.items():
        for spec in (*operation.speed, *operation.small, *more.get(name, ())):
            default = operation.default(spec)
            if operation.refuses(spec, default, "sm_90") is None:
                config = tuned(name, table.device, default, where=operation.where(spec))
                assert operation.refuses(spec, config, "sm_90") is None


def test_the_grid_begins_with_the_default() -> None:
    for operation in OPERATIONS.values():
        for default, _ in tune_kernels.by_default(operation):
            first, *rest = operation.grid(default, 132)
            assert all(getattr(default, name) == value for name, value in first.items())
            assert first not in rest
            assert all(other.keys() == first.keys() for other in rest)


class FakeOperation(Operation[int, Config]):
    """``seconds`` of a shape by stages; an odd number of stages computes nonsense."""

    name, unit, speed, small = "op", "byte", (1, 2), ()

    def __init__(self, seconds: dict[int, float]):
        self.by_stages = seconds

    def label(self, spec: int) -> str:
        return f"shape {spec}"

    def amount(self, spec: int) -> int:
        return spec

    def default(self, spec: int) -> Config:
        return Config()

    def grid(self, default: Config, num_sms: int) -> list[dict[str, Any]]:
        return [{"stages": stages} for stages in self.by_stages]

    def refuses(self, spec: int, config: Config, platform: str) -> str | None:
        return "too many stages" if config.stages > 8 else None

    def timed(self, spec: int, config: Config | None) -> Timed:
        assert config is not None
        return FakeTimed(lambda: 0, 1, seconds=spec * self.by_stages[config.stages])

    def checker(self) -> Callable[[Config], str | None]:
        return lambda config: "odd" if config.stages % 2 else None


@dataclass(frozen=True)
class FakeTimed(Timed):
    fake_seconds: float = 0.0

    def __init__(self, dispatch: Callable[[], Any], calls: int, *, seconds: float):
        super().__init__(dispatch, calls)
        object.__setattr__(self, "fake_seconds", seconds)

    def seconds(self, runs: int) -> float:
        return self.fake_seconds


def _tune(seconds: dict[int, float], minutes: float = 1.0) -> TunedConfig | None:
    target: dict[str, Any] = {"platform": "sm_90", "num_sms": 1}
    deadline = time.monotonic() + 60 * minutes
    return tune_kernels.tune(FakeOperation(seconds), Config(), (1, 2), **target, deadline=deadline)


def test_the_fastest_right_config_is_kept() -> None:
    entry = _tune({2: 4e-6, 4: 3e-6, 6: 2e-6, 5: 1e-6, 9: 1e-9, 0: 1e-9})
    assert entry is not None
    assert (entry.op, entry.replaces, entry.config) == ("op", {"stages": 2}, {"stages": 6})
    assert entry.microseconds == pytest.approx({"shape 1": 2.0, "shape 2": 4.0})
    assert entry.speedup == pytest.approx(2.0)
    assert entry.made_by["versions"]["jax"]


def test_noise_does_not_replace_the_default() -> None:
    entry = _tune({2: 4e-6, 4: 3.99e-6})
    assert entry is not None and entry.config == {"stages": 2} and entry.speedup == 1.0


def test_without_time_the_default_is_kept() -> None:
    entry = _tune({2: 4e-6, 4: 1e-6}, minutes=-1)
    assert entry is not None and entry.config == {"stages": 2}


def test_nothing_right_is_no_entry() -> None:
    assert _tune({5: 1e-6, 7: 2e-6}) is None


def test_operations_that_were_not_tuned_keep_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    others = [TunedConfig(op, {}, {}, {}, None, {}) for op in ("a", "op", "z")]
    path.write_text(TuningTable("NVIDIA X1", tuple(others)).to_json())
    text = tune_kernels.merged(path, "NVIDIA X1", {"op"}, [ENTRY])
    assert TuningTable.from_json(text).tuned == (others[0], ENTRY, others[2])
