"""``jaxllm lab``: prints what the engine's own room finds, which is imported by name: the server
brings no JAX.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from jaxllm.weights.json_file import read_json_object


def run_check(variant: str, params: str | None, *, interpret: bool) -> int:
    """Print the table. Returns 1 if anything failed.

    Raises:
        ConfigError: there is no such variant, or a value does not fit it.
    """
    check: Any = import_module("jaxllm.lab.check")
    values = read_json_object(Path(params)) if params is not None else None
    findings = check.check_variant(variant, values, interpret=interpret)
    print("\n".join(check.table(findings)))
    return int(any(finding.ok is False for finding in findings))
