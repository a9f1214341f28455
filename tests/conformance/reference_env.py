"""The reference environment: a Python of its own with CPU torch and transformers.

Torch never enters jaxllm's environment. ``python reference_env.py DIR`` makes it once; the tests
find it through :func:`reference_python`. Uses the standard library only.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_DIR = ROOT / ".venv-reference"

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "jinja2", "numpy", "safetensors")
# 3.11 first: where pip is offered a local wheel of CPU torch, it is built for that Python.
CANDIDATES = ("python3.11", "/usr/bin/python3.11", "python3.12", "python3.13", sys.executable)
_PROBE = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
_VERSIONS = "import torch, transformers; print(torch.__version__, transformers.__version__)"


def interpreter(directory: Path) -> Path:
    return directory / "bin" / "python"


def reference_python(directory: Path = DEFAULT_DIR) -> Path | None:
    """The environment's interpreter, or None when it was not (completely) made."""
    return interpreter(directory) if _stamp(directory).exists() else None


def create(directory: Path) -> None:
    """Make the environment with the first Python that can install the requirements.

    Raises:
        RuntimeError: no Python on this machine could; the message holds each one's reason.
    """
    wanted = json.dumps(REQUIREMENTS)
    stamp = _stamp(directory)
    if stamp.exists() and stamp.read_text() == wanted and _versions(directory):
        return
    reasons: list[str] = []
    for candidate in dict.fromkeys(CANDIDATES):
        if (
            shutil.which(candidate) is None
            or subprocess.run(
                [candidate, "-c", _PROBE], capture_output=True, check=False
            ).returncode
        ):
            continue
        failure = _install(candidate, directory)
        if failure is None:
            stamp.write_text(wanted)
            print(f"reference environment: {_versions(directory)}", file=sys.stderr)
            return
        reasons.append(f"{candidate}: {failure}")
    raise RuntimeError("\n".join(reasons) or "no Python 3.11 or newer with the venv module")


def _stamp(directory: Path) -> Path:
    return directory / "complete.json"


def _install(python: str, directory: Path) -> str | None:
    """Install with ``python``; returns why it failed, or None."""
    print(
        f"reference environment: installing torch and transformers with {python}", file=sys.stderr
    )
    options = ("--quiet", "--no-input", "--disable-pip-version-check", "--only-binary=:all:")
    steps = (
        [python, "-m", "venv", "--clear", str(directory)],
        [str(interpreter(directory)), "-m", "pip", "install", *options, *REQUIREMENTS],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr or done.stdout).strip()[-400:] or f"exit code {done.returncode}"
    return None if _versions(directory) else "torch or transformers does not import"


def _versions(directory: Path) -> str:
    """``"TORCH TRANSFORMERS"``, or ``""`` when they do not import."""
    command = [str(interpreter(directory)), "-c", _VERSIONS]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    try:
        create(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_DIR)
    except RuntimeError as error:
        sys.exit(f"{error}")
