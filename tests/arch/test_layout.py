"""Where things live: the root, the README of every room, what the wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxllm", "pallas_kernels", "server")
ROOT_NAMES = {
    ".ci",
    ".gitignore",
    ".python-version",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "configs",
    "constraints.txt",
    "jaxllm",
    "pallas_kernels",
    "pyproject.toml",
    "scripts",
    "server",
    "tests",
}


def _tracked() -> list[Path]:
    """Files git knows or would add: what a clone, or the next commit, holds."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def _rooms() -> list[Path]:
    return sorted({p.parent for p in _tracked() if p.suffix == ".py" and p.parts[0] in PACKAGES})


def test_root_holds_exactly_the_agreed_names() -> None:
    assert {path.parts[0] for path in _tracked()} == ROOT_NAMES


def test_every_room_has_a_map_of_its_files() -> None:
    missing: dict[str, list[str]] = {}
    for room in _rooms():
        readme = ROOT / room / "README.md"
        text = readme.read_text() if readme.exists() else ""
        files = {p.name for p in _tracked() if p.parent == room} - {"README.md", "py.typed"}
        folders = {f"{child.name}/" for child in _rooms() if child.parent == room}
        wanted = {name for name in files if name != "__init__.py"} | folders
        absent = sorted(name for name in wanted if name not in text)
        if absent or not text:
            missing[room.as_posix()] = absent
    assert not missing


def test_maps_name_no_file_that_is_gone() -> None:
    gone: dict[str, list[str]] = {}
    for room in _rooms():
        readme = ROOT / room / "README.md"
        words = readme.read_text().replace("`", " ").split() if readme.exists() else []
        named = {
            word.strip(",.:;()*|[]") for word in words if word.strip(",.:;()*|[]").endswith(".py")
        }
        anywhere = {path.as_posix() for path in _tracked()}
        lost = [n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in anywhere)]
        if lost:
            gone[room.as_posix()] = lost
    assert not gone


@pytest.mark.slow
def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    modules = {path.as_posix() for path in _tracked() if path.suffix == ".py"}
    shipped = {name for name in names if name.endswith(".py")}
    assert shipped == {name for name in modules if name.split("/")[0] in PACKAGES}
    assert "pallas_kernels/tuning/nvidia-h200.json" in names
