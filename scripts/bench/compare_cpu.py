"""jaxllm beside transformers + torch on this CPU: same weights, bfloat16, same number of threads.

    compare_cpu.py [--repeats 3] [--json FILE]

Each side is a process of its own that loads once and then runs when told, so that the repeats
alternate and a busy moment of the machine hits both. Reported are medians, with the load average.
The prompt is random token ids, new in every repeat; decoding is greedy and ignores EOS. The
reference runs a bare loop over its KV cache, which is quicker than its ``generate()``.
"""

# pyright: reportMissingImports=false
# torch lives in the reference environment only

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tests.conformance, wherever this is started from
REFERENCE_PYTHON = ROOT / ".venv-reference" / "bin" / "python"
LOW, HIGH = 1000, 40000  # token ids of the prompts

# (prompts, tokens to generate) -> seconds
Run = Callable[[list[list[int]], int], float]


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    import numpy as np

    random = np.random.RandomState(seed)
    return random.randint(LOW, HIGH, size=(count, length)).tolist()


def transformers_side(model_dir: str, threads: int) -> tuple[Run, str]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.eval()

    def run(batch: list[list[int]], count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for prompt in batch:  # one after the other
                feed, cache = torch.tensor([prompt]), None
                for _ in range(count):
                    out = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache = out.past_key_values
                    feed = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    return run, f"transformers {transformers.__version__}, torch {torch.__version__}"


def jaxllm_side(model: str, threads: int) -> tuple[Run, str]:
    from importlib.metadata import version

    from jaxllm import LLM, SamplingParams, __version__

    llm = LLM(model=model, dtype="bfloat16", max_num_seqs=16, max_model_len=1024)

    def run(batch: list[list[int]], count: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        started = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if lengths != {count}:
            raise RuntimeError(f"asked for {count} tokens, got {lengths}")
        return seconds

    return run, f"jaxllm {__version__}, jax {version('jax')}"


SIDES: dict[str, Callable[[str, int], tuple[Run, str]]] = {
    "transformers": transformers_side,
    "jaxllm": jaxllm_side,
}


def serve_side(name: str, model: str, threads: int) -> None:
    """A side's loop: one JSON request a line on stdin, one JSON answer a line on stdout."""
    if hasattr(os, "sched_setaffinity"):  # binds XLA's threads, which have no setting of their own
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr
    run, versions = SIDES[name](model, threads)
    print(json.dumps(versions), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        batch = prompts(request["batch"], request["length"], request["seed"])
        print(json.dumps(run(batch, request["count"])), file=replies, flush=True)


class Side:
    """Handle on a side's process."""

    def __init__(self, python: Path, name: str, model: str, threads: int) -> None:
        command = [str(python), __file__, "--side", name, "--model", model]
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.name = name
        self.versions = self._reply()

    def _reply(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the {self.name} side ended with exit code {self.process.wait()}")
        return json.loads(line)

    def seconds(self, *, batch: int, length: int, count: int, seed: int) -> float:
        assert self.process.stdin
        request = {"batch": batch, "length": length, "count": count, "seed": seed}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


def measure(side: Side, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Rates in tokens a second: one request's prefill and decode, and 16 requests' output."""
    length, count = options.prompt_len, options.output_len
    prefill = side.seconds(batch=1, length=length, count=1, seed=seed)
    whole = side.seconds(batch=1, length=length, count=count, seed=seed + 1)
    rates = {
        "prefill": length / prefill,
        "decode": (count - 1) / max(whole - prefill, 1e-9),
        "batch_1": count / whole,
        "load": os.getloadavg()[0],
    }
    if side.name == "jaxllm":
        batch = options.concurrency
        together = side.seconds(batch=batch, length=length, count=count, seed=seed + 2)
        rates["concurrent"] = batch * count / together
    return rates


def compare(options: argparse.Namespace) -> dict[str, Any]:
    sides = [
        Side(options.reference_python, "transformers", options.reference_model, options.threads),
        Side(Path(sys.executable), "jaxllm", options.model, options.threads),
    ]
    runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for repeat in range(-1, options.repeats):  # the first round warms both up and does not count
        for side in sides:
            rates = measure(side, options, seed=100 * (repeat + 1))
            if repeat >= 0:
                runs[side.name].append(rates)
                print(side.name, {key: round(value, 1) for key, value in rates.items()})
    for side in sides:
        side.close()
    medians = {
        name: {key: median(run[key] for run in of_side) for key in of_side[0]}
        for name, of_side in runs.items()
    }
    ours, theirs = medians["jaxllm"], medians["transformers"]
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "dtype": "bfloat16",
        "prompt_len": options.prompt_len,
        "output_len": options.output_len,
        "concurrency": options.concurrency,
        "versions": {side.name: side.versions for side in sides},
        "tokens_per_second": medians,
        "ratios": {
            "prefill": ours["prefill"] / theirs["prefill"],
            "decode": ours["decode"] / theirs["decode"],
            "concurrent_over_sequential": ours["concurrent"] / theirs["batch_1"],
        },
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--reference-model", help="Hugging Face directory; default: the default model"
    )
    parser.add_argument("--reference-python", type=Path, default=REFERENCE_PYTHON)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve_side(options.side, options.model, options.threads)
        return
    if options.reference_model:
        result = compare(options)
    else:
        from tests.conformance.export_hf import export_default_model

        with tempfile.TemporaryDirectory() as name:
            options.reference_model = str(export_default_model(Path(name)))
            result = compare(options)
    print(json.dumps(result["tokens_per_second"], indent=2))
    print(json.dumps(result["ratios"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
