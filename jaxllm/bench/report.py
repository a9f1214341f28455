"""What a benchmark's result says beside its figures: machine, versions, command. Prints and writes.

Figures without these cannot be compared with anything.
"""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxllm.config.engine import EngineConfig
from jaxllm.config.env import cpu_count
from jaxllm.errors import ConfigError

_PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "numpy", "transformers")


def check_writable(path: Path | None) -> None:
    """Raises ConfigError now rather than after the measurement."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(f"--json {path}: its directory does not exist.")


def make_report(config: EngineConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """Call it after the engine was built: see ``make_device_report``."""
    return make_device_report({**figures, "model": config.model, "engine_config": asdict(config)})


def make_device_report(figures: dict[str, Any]) -> dict[str, Any]:
    """The device is asked of the JAX that was measured in this process."""
    return make_client_report({**figures, "device": _device()})


def make_client_report(figures: dict[str, Any]) -> dict[str, Any]:
    """For measurements from outside an engine: no device, which is somebody else's."""
    return {
        **figures,
        "host": {"machine": platform.machine(), "cpus": cpu_count()},
        "python": platform.python_version(),
        "versions": _versions(),
        "command": ["jaxllm", *sys.argv[1:]],
        "commit": _commit(),
    }


def write_report(report: dict[str, Any], path: Path | None) -> None:
    """Raises ConfigError when the file cannot be written."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}.") from error


def _device() -> dict[str, Any]:
    jax = import_module(
        "jax"
    )  # by name: host code has no JAX, but what was measured has started it
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "machine": platform.machine(),
        "cpus": cpu_count(),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout this file is in, with "-dirty" if it was changed; None if there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
