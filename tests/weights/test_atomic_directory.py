"""atomic_directory: whole or absent, whatever fails and whenever the process is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.errors import CheckpointError
from jaxllm.weights.atomic_directory import atomic_directory, remove_stale

CALLS = ("mkdir", "rename", "fsync", "open")


def fill(destination: Path, text: str = "new", *, replace: bool = False) -> None:
    with atomic_directory(destination, replace=replace) as work:
        (work / "a").write_text(text)
        (work / "sub").mkdir()
        (work / "sub" / "b").write_text(text)


def content(destination: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in destination.rglob("*") if p.is_file()}


def test_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "x") as work:
        (work / "a").write_text("1")
        assert not (tmp_path / "x").exists()
    assert content(tmp_path / "x") == {"a": "1"}
    assert os.listdir(tmp_path) == ["x"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "x") as work:
        (work / "a").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_existing_is_refused_or_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "x", "old")
    with pytest.raises(CheckpointError, match="--force"):
        fill(tmp_path / "x")
    assert content(tmp_path / "x") == {"a": "old", "b": "old"}
    fill(tmp_path / "x", replace=True)
    assert content(tmp_path / "x") == {"a": "new", "b": "new"}
    assert os.listdir(tmp_path) == ["x"]


def test_of_two_writers_one_wins(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot move"), atomic_directory(tmp_path / "x") as w:
        (w / "a").write_text("slow")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "a").write_text("fast")
    assert content(tmp_path / "x") == {"a": "fast"}


def test_work_in_progress_is_not_stale(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "x") as work:
        (work / "a").write_text("1")
        code = (
            "from pathlib import Path; import sys\n"
            "from jaxllm.weights.atomic_directory import remove_stale\n"
            "remove_stale(Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True)
    assert content(tmp_path / "x") == {"a": "1"}


def test_stale_is_removed_and_neighbours_are_not(tmp_path: Path) -> None:
    for name in ("x.tmp-1", f"x.tmp-{os.getpid()}", "x.old-1", "x.mine-1", "y.tmp-1"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["x", "x.mine-1", "y.tmp-1"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failing_call_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    failed = 0
    for call in CALLS:
        original = getattr(os, call)
        for number in range(20):
            destination = tmp_path / f"{call}{number}" / "x"
            destination.parent.mkdir()
            if replace:
                fill(destination, "old")
            count = [0]

            def fails(*args: object, o=original, c=count, n=number, **kwargs: object) -> object:
                c[0] += 1
                if c[0] == n + 1:
                    raise OSError(28, "No space left on device")
                return o(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, fails)
                try:
                    fill(destination, replace=replace)
                except (OSError, CheckpointError):
                    failed += 1
            remove_stale(destination)
            found = content(destination) if destination.exists() else None
            whole = [{"a": "new", "b": "new"}, {"a": "old", "b": "old"} if replace else None]
            assert found in whole, (call, number)
            assert set(os.listdir(destination.parent)) <= {"x"}
    assert failed >= 8


KILLED = """
import os, signal, sys
from pathlib import Path
number, count = int(sys.argv[2]), 0
def deadly(original):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
from jaxllm.weights.atomic_directory import atomic_directory
for name in ("rename", "fsync", "mkdir", "rmdir", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))
with atomic_directory(Path(sys.argv[1]), replace=True) as work:
    (work / "a").write_text("new")
    (work / "b").write_text("new")
"""


@pytest.mark.parametrize("number", [1, 3, 5, 6, 7, 8, 9, 10])
def test_killed_at_any_moment(tmp_path: Path, number: int) -> None:
    destination = tmp_path / "x"
    fill(destination, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(destination), str(number)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    remove_stale(destination)
    assert content(destination) in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
    assert os.listdir(tmp_path) == ["x"]
