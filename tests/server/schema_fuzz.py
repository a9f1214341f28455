"""schemathesis, from an environment of its own, against our /openapi.json."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from tests.server.command import ROOT

PROGRAM = ROOT / ".venv-clients" / "schemathesis" / "bin" / "schemathesis"
HOOKS = ROOT / "tests" / "server" / "schema_hooks.py"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
ACCEPTANCE = "what_the_schema_allows_is_accepted"  # our own, of schema_hooks.py
MAX_LINE = 500  # of its report
MAX_BODY_BYTES = 2**25  # some of its bodies are as long as the schema lets them be


@dataclass(frozen=True, slots=True)
class Report:
    passed: bool
    num_requests: int
    output: str


def run_schemathesis(
    url: str, *, max_examples: int, seed: int, limit_s: float, checks: Sequence[str] = CHECKS
) -> Report:
    """Right and wrong requests of every operation, NUL bytes among them."""
    command = [
        PROGRAM, "run", f"{url}/openapi.json", "--mode", "all", "--phases", "coverage,fuzzing",
        "--checks", ",".join(checks), "--max-examples", str(max_examples), "--seed", str(seed),
        "--continue-on-failure", "--no-shrink", "--suppress-health-check", "all",
        "--warnings", "off", "--no-color",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=directory,
            timeout=limit_s,
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)},
        )
    counted = re.search(r"^ *(\d+) generated", done.stdout, re.MULTILINE)
    number = int(counted[1]) if counted else 0
    lines = [line[:MAX_LINE] for line in done.stdout.splitlines()]  # bodies may be megabytes
    output = "\n".join(lines)[-6000:] + done.stderr[-1000:]
    return Report(done.returncode == 0, number, output)
