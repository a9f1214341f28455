"""What the host does in a step under grammars, and whether a device of a given speed waits for it.

    grammar_host.py --tokenizer DIR [--rows 64] [--steps 60] [--repeats 3] [--device-ms 6.2]
        [--jump-forward] [--json FILE]

The engine is the real one, from requests to detokenised text. The device is a clock: a forward
program takes --device-ms, a sampler 0.1 ms, one after the other in the order of dispatch, and what
the sampler draws, evenly from what the mask allows, is drawn outside of all times. To dispatch a
forward program takes --dispatch-ms, in which Python's lock is free, as on a GPU.
Constrained rows follow the schema of grammar_cost.py, free ones draw anything. "host_us": see
host_phases.py.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxllm.bench.report import write_report  # noqa: E402
from jaxllm.config.plan import BatchBucket  # noqa: E402
from jaxllm.core.scheduler import Scheduler  # noqa: E402
from jaxllm.engine.engine_core import EngineCore  # noqa: E402
from jaxllm.frontend.output_processor import OutputProcessor  # noqa: E402
from jaxllm.frontend.request_state import RequestState  # noqa: E402
from jaxllm.grammar.checker import GrammarChecker  # noqa: E402
from jaxllm.grammar.compiler import THREADS, GrammarCompiler  # noqa: E402
from jaxllm.grammar.ll_tokenizer import load_ll_tokenizer  # noqa: E402
from jaxllm.messages import EngineCoreRequest  # noqa: E402
from jaxllm.parallel.mesh import DeviceMesh  # noqa: E402
from jaxllm.runner import masking  # noqa: E402
from jaxllm.runner.model_runner import ModelRunner  # noqa: E402
from jaxllm.runner.row_layout import RowLayout  # noqa: E402
from jaxllm.runner.spares import Program  # noqa: E402
from jaxllm.runner.step_layout import StepLayout  # noqa: E402
from jaxllm.sampling.metadata import SamplerMode, SamplerOutput  # noqa: E402
from jaxllm.sampling_params import SamplingParams  # noqa: E402
from jaxllm.simulation.plans import make_plan  # noqa: E402
from jaxllm.tokenizer.tokenizer import Tokenizer  # noqa: E402
from scripts.bench.grammar_cost import SPEC  # noqa: E402
from scripts.bench.host_phases import HostPhases  # noqa: E402

SAMPLE_S = 1e-4
PROMPT = 4  # tokens

Vocabulary = tuple[str, int, tuple[int, ...]]  # directory, size, ends of an answer


class Clockwork:
    """A device that computes nothing and takes its time. ``spent``: seconds that the drawing of
    tokens took, which no device would.
    """

    def __init__(self, forward_s: float):
        self.forward_s = forward_s
        self.spent = 0.0
        self._free_at = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.spent

    def run(self, seconds: float) -> float:
        """When what is dispatched now will be done."""
        self._free_at = max(self._free_at, self.now()) + seconds
        return self._free_at

    def wait(self, until: float) -> None:
        while (left := until - self.now()) > 0:
            time.sleep(max(left - 2e-4, 0))


class Late:
    """An array on the device: there at a certain time."""

    def __init__(self, device: Clockwork, array: np.ndarray, there: float):
        self._device, self._array, self._there = device, array, there
        self.shape, self.dtype = array.shape, array.dtype

    def copy_to_host_async(self) -> None: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._device.wait(self._there)
        return self._array


class ClockworkPrograms:
    """Programs of such a device."""

    def __init__(self, plan: Any, device: Clockwork, dispatch_s: float):
        self._dispatch_s = dispatch_s
        self._block_size = plan.block_size
        self.rows = RowLayout(plan.max_blocks_per_row)
        self.devices = DeviceMesh()
        self.full_rows = sorted({bucket.num_rows for bucket in plan.buckets})
        self._device, self._vocab = device, plan.model.vocab_size
        self._rng = np.random.default_rng(0)

    def step_program(self, bucket: BatchBucket) -> Any:
        return SimpleNamespace(layout=StepLayout(bucket, self._block_size))

    def mode_for(self, num_rows: int, mode: SamplerMode) -> SamplerMode:
        return mode

    def forward(self, bucket: BatchBucket) -> Program:
        logits = jax.ShapeDtypeStruct((bucket.num_rows, self._vocab), np.float32)

        def program(params: Any, kv: Any, buffers: Any, packed: Any, spares: Any) -> Any:
            self._device.run(self._device.forward_s)
            time.sleep(self._dispatch_s)
            return kv, buffers, logits, None, None

        return Program("forward", program)

    def sample(self, num_rows: int, mode: SamplerMode) -> Program:
        def program(buffers: Any, logits: Any, slots: Any, mask: Any, spares: Any) -> Any:
            there = self._device.run(SAMPLE_S)
            began = time.perf_counter()
            token_ids = [self._draw(row) for row in np.asarray(mask)]
            self._device.spent += time.perf_counter() - began
            ids = Late(self._device, np.array(token_ids, np.int32), there)
            finite = Late(self._device, np.full(num_rows, True), there)
            return buffers, SamplerOutput(ids, finite, None)  # type: ignore[arg-type]

        return Program("sample", program)

    def _draw(self, mask: np.ndarray) -> int:
        words = mask.view(np.uint8)
        for token in self._rng.integers(0, self._vocab, 20).tolist():
            if words[token >> 3] >> (token & 7) & 1:
                return token
        allowed = np.flatnonzero(np.unpackbits(words, bitorder="little")[: self._vocab])
        return int(self._rng.choice(allowed)) if allowed.size else 0


def make_engine(args: argparse.Namespace, vocab: Vocabulary, device: Clockwork) -> EngineCore:
    sizes = {"max_model_len": 1024, "block_size": 64, "num_blocks": args.rows * 16 + 1}
    plan = make_plan(
        max_num_seqs=args.rows, max_num_batched_tokens=4096, vocab_size=vocab[1], **sizes
    )
    plan = replace(plan, jump_forward=args.jump_forward)
    compiler = GrammarCompiler(lambda: load_ll_tokenizer(*vocab))
    programs: Any = ClockworkPrograms(plan, device, args.dispatch_ms / 1e3)
    return EngineCore(Scheduler(plan), ModelRunner(plan, (), programs, compiler))


def run(core: EngineCore, outputs: OutputProcessor, states: Sequence[RequestState]) -> None:
    for state in states:
        outputs.add(state)
    told = None
    while told is not None or core.has_work():
        # As LLM does: in the shadow of the device.
        to_text = cache(partial(outputs.process, told)) if told is not None else tuple
        step = core.step(to_text)
        if aborts := to_text():
            core.abort(aborts)
        told = step


def requests(rows: int, steps: int, grammar: str, ends: Sequence[int]) -> list[EngineCoreRequest]:
    """Free ones ask for min_tokens, so that both kinds run the same sampler."""
    least = 0 if grammar else steps
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=steps, min_tokens=least)
    own = (params, steps, tuple(ends) if grammar else (), (), grammar)
    return [EngineCoreRequest(str(i), (i % 256,) * PROMPT, *own) for i in range(rows)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    masking.MIXED_COST.pop("cpu", None)  # as on a device of its own
    tokenizer = Tokenizer.from_dir(str(args.tokenizer))
    ends = (tokenizer.eos_token_id or 0,)
    vocab = (str(args.tokenizer), tokenizer.backend.get_vocab_size(), ends)
    checker = GrammarChecker(*vocab)
    schema = checker.submit(SPEC).result()
    checker.close()
    device = Clockwork(args.device_ms / 1e3)
    core, outputs = make_engine(args, vocab, device), OutputProcessor()
    phases = HostPhases(device.now)
    phases.watch(core)
    phases.time(outputs, "process", "text")
    found: dict[str, list[dict[str, int]]] = {"free": [], "constrained": []}
    for _ in range(args.repeats + 1):
        for name, grammar in (("free", ""), ("constrained", schema)):
            states: list[RequestState] = []
            for request in requests(args.rows, args.steps, grammar, ends):
                params = request.sampling_params
                states.append(RequestState(request.request_id, None, (request,), params, tokenizer))
                core.add_request(request)
            run(core, outputs, states)
            found[name].append(phases.take())
    # The first round compiles, and finds the lexer's states.
    host_us = {
        name: {
            phase: round(statistics.median(us.get(phase, 0) for us in rounds))
            for phase in rounds[0]
        }
        for name, (_, *rounds) in found.items()
    }
    ratio = host_us["constrained"]["step"] / host_us["free"]["step"]
    about = {"vocab_size": vocab[1], "device_ms": args.device_ms, "mask_threads": THREADS}
    about["dispatch_ms"] = args.dispatch_ms
    return about | {"host_us": host_us, "ratio": round(ratio, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device-ms", type=float, default=6.2, help="of a forward program")
    parser.add_argument("--dispatch-ms", type=float, default=0.0, help="of a forward program")
    parser.add_argument("--jump-forward", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    results = measure(args)
    print(json.dumps(results, indent=2))
    write_report(results, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
