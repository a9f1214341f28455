"""``jaxllm bench throughput``: a workload's requests all at once, as fast as they go."""

import time
from pathlib import Path
from typing import Any

from jaxllm.bench.report import check_writable, make_report, write_report
from jaxllm.bench.start import start_engine
from jaxllm.bench.workload import Workload, make_workload
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import RequestFailedError
from jaxllm.llm import LLM
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams


def run_throughput(
    config: EngineConfig,
    *,
    workload: str = "a",
    num_prompts: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run it, print the figures, return (and write) the report.

    Raises:
        JaxLLMError: the arguments are wrong, the engine does not start, or a request failed.
    """
    check_writable(json_path)
    work = make_workload(workload, num_prompts, input_len, output_len)
    described = work.describe()
    llm, start_seconds = start_engine(config, work.longest)
    work = work.folded(llm.info.vocab_size)
    others = [prompt[::-1] for prompt in work.prompts[:2]]  # the prefix cache must not know them
    measure(llm, Workload("warm-up", others, [2] * len(others)))
    seconds = measure(llm, work, use_tqdm=True)
    figures = {
        "benchmark": "throughput",
        **described,
        "ids_folded_to_vocabulary": work.folded_to,
        "start_seconds": round(start_seconds, 2),
        "elapsed_seconds": seconds,
        "requests_per_second": len(work.prompts) / seconds,
        "output_tokens_per_second": work.num_output_tokens / seconds,
        "total_tokens_per_second": (work.num_input_tokens + work.num_output_tokens) / seconds,
    }
    report = make_report(config, figures)
    _print(report)
    write_report(report, json_path)
    return report


def measure(llm: LLM, work: Workload, *, use_tqdm: bool = False) -> float:
    """Seconds until the last token of the last request.

    Raises:
        RequestFailedError: a request failed or ended early; the time would mean nothing.
    """
    params = [
        SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=length,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for length in work.output_lens
    ]
    started = time.perf_counter()
    outputs = llm.generate(work.prompts, params, use_tqdm)
    seconds = time.perf_counter() - started
    for output, length in zip(outputs, work.output_lens, strict=True):
        _check_length(output, length)
    return seconds


def _check_length(output: RequestOutput, expected: int) -> None:
    num_tokens = len(output.outputs[0].token_ids)
    if output.error is not None or num_tokens != expected:
        reason = output.error or f"{num_tokens} tokens instead of {expected}"
        raise RequestFailedError(f"Request {output.request_id} of the workload failed: {reason}.")


def _print(report: dict[str, Any]) -> None:
    device = report["device"]
    print(f"model            {report['model']} on {device['kind']} ({device['platform']})")
    print(
        f"workload         {report['workload']}: {report['n']} prompts, "
        f"{report['in_tokens']} tokens in, {report['out_tokens']} out, sha {report['sha']}"
    )
    if report["ids_folded_to_vocabulary"] is not None:
        print(f"                 ids folded into {report['ids_folded_to_vocabulary']} tokens")
    print(f"elapsed          {report['elapsed_seconds']:.2f} s")
    print(f"requests/s       {report['requests_per_second']:.2f}")
    print(f"output tokens/s  {report['output_tokens_per_second']:.1f}")
    print(f"total tokens/s   {report['total_tokens_per_second']:.1f}")
