"""What is promised for one H200: every row, and where its figure is found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]  # by part
MS = "ms"


@dataclass(frozen=True)
class Row:
    """``target`` and ``aim`` are bounds: at most, or with ``least`` at least. A row without a
    target is told only. ``value`` raises what a missing figure raises.
    """

    group: str
    what: str
    value: Callable[[Figures], float]
    target: float | None = None
    aim: float | None = None
    unit: str = ""
    least: bool = False
    beside: str = ""  # vLLM 0.26 on the same kind of card, or what else to compare with


def _step(index: int) -> Callable[[Figures], float]:
    return lambda f: f["latency"]["batches"][index]["decode_step_ms"]


def _ttft(length: int) -> Callable[[Figures], float]:
    return lambda f: f[f"ttft-{length}"]["batches"][0]["ttft_ms"]


def _rate(part: str) -> Callable[[Figures], float]:
    return lambda f: f[part]["output_tokens_per_second"]


def _kernel(op: str, shape: str, key: str, scale: float) -> Callable[[Figures], float]:
    def value(figures: Figures) -> float:
        rows = figures["kernels"]["rows"]
        return next(r[key] for r in rows if (r["op"], r["shape"]) == (op, shape)) / scale

    return value


def _variant(op: str, name: str) -> Callable[[Figures], float]:
    return lambda f: f["variants"][op][name]["of_plain"]


def _layer(op: str, name: str) -> Callable[[Figures], float]:
    return lambda f: f["layers"][op][name]["of_plain"]


def _outside(figures: Figures) -> float:
    """Thunks beside the command buffers, in the longest sequence after XLA has made them."""
    found = figures["thunks"]["thunks"]
    last = max([one for one in found if one["command_buffers"]] or found, key=lambda o: o["thunks"])
    return sum(last["outside"].values()) - last["command_buffers"]


def _called(*names: str) -> Callable[[Figures], float]:
    def value(figures: Figures) -> float:
        calls = figures["launches"]["per_step"]
        if not calls:
            raise KeyError("no calls of the driver were seen")
        return sum(n for call, n in calls.items() if call.startswith(names))

    return value


def _over_decode(phase: str, which: str) -> Callable[[Figures], float]:
    def value(figures: Figures) -> float:
        found = figures["mixing"]
        return found[which][phase]["itl_ms_p99"] / found["without"]["decode"]["itl_ms_p50"]

    return value


def _swapped(*keys: str) -> Callable[[Figures], float]:
    def value(figures: Figures) -> float:
        found = figures["swapping"]
        for key in keys:
            found = found[key]
        return found

    return value


_DECODE = "decode step"
_STEPS = ((1, 4.3, 3.9, "4.89"), (8, 4.6, 4.1, "5.24"), (64, 6.6, 6.2, "7.38"))
_STEPS += ((256, 15.5, 14.3, "16.8"),)
_READ = (("B32 x 4096", 3.9), ("B8 x 8192", 3.9), ("B64 x 1024", 3.6), ("B1 x 65536", 3.3))
OPS = "decode", "prefill"
_PLAIN = ("sliding_window", "alibi", "sinks", "prefix_lm", "document_mask", "t5_bias", "dilated")
_PLAIN += ("block_global", "head_windows", "request_bias", "token_bias", "forgetting")

ENGINE = (
    *(
        Row(_DECODE, f"{batch} rows", _step(index), must, aim, MS, beside=vllm)
        for index, (batch, must, aim, vllm) in enumerate(_STEPS)
    ),
    Row("first token", "2,048 tokens", _ttft(2048), 52, 46, MS, beside="52"),
    Row("first token", "8,192 tokens", _ttft(8192), 216, 195, MS, beside="216"),
    Row("offline", "workload A", _rate("workload-a"), 4200, 4500, "tok/s", True, "3,998"),
    Row("offline", "workload B", _rate("workload-b"), 9500, 11_000, "tok/s", True, "8,500"),
    Row("start", "cold", lambda f: f["startup"]["cold"]["first_token_seconds"], 60, 30, "s"),
    Row("start", "warm", lambda f: f["startup"]["warm"]["first_token_seconds"], 25, 12, "s",
        beside="85"),
    Row("start", "programs", lambda f: f["startup"]["cold"]["engine"]["programs"], 24),
    Row("KV cache", "planned", lambda f: f["plan"]["kv_tokens"], 830_000, 835_000, "tokens", True,
        "834,128"),
    Row("KV cache", "of the engine", lambda f: f["startup"]["warm"]["engine"]["kv_tokens"],
        830_000, 835_000, "tokens", True, "834,128"),
)  # fmt: skip
KERNELS = (
    *(
        Row("decode kernel", shape, _kernel("decode", shape, "rate", 1e12), rate, None, "TB/s",
            True)
        for shape, rate in _READ
    ),
    *(
        Row("decode kernel", f"{shape}, without gaps between launches",
            _kernel("decode", shape, "busy_rate", 1e12), rate, None, "TB/s", True)
        for shape, rate in _READ
    ),
    Row("prefill kernel", "8,192 from scratch",
        _kernel("prefill", "8192 from scratch", "rate", 1e12), 600, None, "TFLOP/s", True),
    Row("prefill kernel", "the same without gaps",
        _kernel("prefill", "8192 from scratch", "busy_rate", 1e12), 600, None, "TFLOP/s", True),
    Row("prefill kernel", "temporaries over K and V gathered",
        lambda f: f["kernels"]["prefill_memory"]["temporary"]
        / f["kernels"]["prefill_memory"]["gathered_kv"], 0.5),
    Row("KV write", "256 tokens",
        _kernel("kv_write", "256 tokens, 32/8 heads of 128", "seconds", 1e-6), unit="us"),
    Row("sampling", "64 x 128,256", _kernel("sampling", "64 x 128256", "seconds", 1e-6), 60, None,
        "us"),
    Row("command buffers", "thunks of a decode step beside them", _outside),
    Row("command buffers", "launches of graphs per step", _called("cuGraphLaunch", "cudaGraphL")),
    Row("command buffers", "launches of kernels per step", _called("cuLaunchK", "cudaLaunchK")),
)  # fmt: skip
SERVED = (
    Row("HTTP", "200 streams, of offline",
        lambda f: _rate("served")(f) / _rate("workload-b")(f), 0.9, None, "x", True),
    Row("HTTP", "of transformers, one by one",
        lambda f: _rate("served")(f) / _rate("sequential")(f), 5, None, "x", True),
    *(
        Row("HTTP", f"p99 {name.upper()}", lambda f, n=name: f["served"][f"{n}_ms"]["p99"], unit=MS)
        for name in ("ttft", "itl", "e2e")
    ),
)  # fmt: skip
SHARING = (
    Row("prefix cache", "hits in 32 conversations",
        lambda f: f["prefix-conversations"]["conversations"]["on"]["hit_rate"], None, None, "",
        True),
    Row("prefix cache", "first token without over with, there",
        lambda f: f["prefix-conversations"]["conversations"]["ttft_off_over_on"], unit="x"),
    Row("prefix cache", "first token, 4,096 cached, of a miss",
        lambda f: 1 / f["prefix-idle"]["idle"]["miss_over_hit"], 0.25, None, "x"),
    Row("prefix cache", "cost where nothing is shared",
        lambda f: 1 / f["prefix-unshared"]["unshared"]["off_over_on"] - 1, 0.02),
    Row("preemption", "computed again over swapped, 8,192 tokens",
        lambda f: f["prefix-urgent"]["urgent"]["computed_again_over_swapped"], 1.0, None, "x",
        True),
    Row("preemption", "the same, blocks alone", _swapped("computed_again_over_swapped"), 1.0, None,
        "x", True),
    *(
        Row("preemption", f"blocks {way}, of what the link can do", _swapped("of_link", way), 0.8,
            None, "x", True)
        for way in ("out", "in")
    ),
    Row("KV cache", "slots in use of those held, B",
        lambda f: f["journal"]["occupancy"]["held_over_allocated"], 0.9, None, "", True),
    Row("64 streams", "p99 ITL beside 8k prompts, of decoding alone",
        _over_decode("arriving", "without"), unit="x"),
    Row("64 streams", "the same with --target-itl-ms", _over_decode("arriving", "with"), 2.0, None,
        "x"),
    Row("64 streams", "prompt tokens/s beside them, without a target",
        lambda f: f["mixing"]["without"]["arriving"]["prefill_tokens_per_second"], unit="tok/s"),
    Row("64 streams", "prompt tokens/s beside them, with",
        lambda f: f["mixing"]["with"]["arriving"]["prefill_tokens_per_second"], unit="tok/s"),
    Row("64 streams", "p99 ITL beside one of 32k, of decoding alone",
        _over_decode("long", "without"), unit="x"),
    Row("64 streams", "first token of the 32k",
        lambda f: f["mixing"]["without"]["long"]["ttft_seconds"], unit="s"),
)  # fmt: skip
ANSWERS = (
    *(
        Row("greedy parity", f"wrong where sure, {name.replace('_', ' ')}",
            lambda f, n=name: f["parity"][n]["wrong_where_sure"], 0)
        for name in ("teacher_forced", "through_hits", "free_running", "preempted")
    ),
    Row("grammar", "64 rows, free step over constrained",
        lambda f: 1 / f["grammar"]["step"]["ratio"], 0.95, None, "x", True),
)  # fmt: skip
LAB = (
    *(Row("decode variant", n, _variant("decode", n), 0.9, None, "x", True) for n in _PLAIN),
    Row("decode variant", "softcap", _variant("decode", "softcap"), 0.9, None, "x", True),
    *(Row("prefill variant", n, _variant("prefill", n), 0.85, None, "x", True) for n in _PLAIN),
    Row("prefill variant", "softcap", _variant("prefill", "softcap"), 0.75, None, "x", True),
    Row("latents, 16 heads", "decode, of plain that reads as much",
        lambda f: f["latents"]["decode"]["B128 x 4096, 16 heads"]["of_plain"],
        0.9, None, "x", True),
    Row("latents, 16 heads", "prefill, of plain that multiplies as much",
        lambda f: f["latents"]["prefill"]["8192 from scratch, 16 heads"]["of_plain"],
        0.85, None, "x", True),
    Row("window of 1,024", "over 65,536, of plain over 1,024",
        lambda f: f["variants"]["window"]["window"]["of_plain"], 0.9, None, "x", True),
    Row("block_global", "decode over 65,536, of plain over the 1,088 it sees",
        lambda f: f["variants"]["masked"]["block_global"]["of_plain"], 0.8, None, "x", True),
    *(Row("block_global", f"{op} over 65,536: what to walk is found in",
          lambda f, op=op: f["variants"]["maps"][op], 100, None, "us") for op in OPS),
    *(Row(f"{op} layer", "nope", _layer(op, "nope"), 0.9, None, "x", True) for op in OPS),
    Row("decode layer", "forgetting", _layer("decode", "forgetting"), 0.9, None, "x", True),
    Row("prefill layer", "forgetting", _layer("prefill", "forgetting"), 0.85, None, "x", True),
    Row("decode layer", "differential", _layer("decode", "differential"), 0.9, None, "x", True),
    # Each of its two softmaxes weighs values of both: half as many products more.
    Row("prefill layer", "differential", _layer("prefill", "differential"), unit="x"),
    *(Row(f"{op} layer", "latent", _layer(op, "latent"), unit="x") for op in OPS),
    Row("capacity", "predicted tok/s of B, off by",
        lambda f: abs(f["journal"]["capacity"]["off"]["output_tokens_per_second"]), 0.1),
)  # fmt: skip
ROWS = ENGINE + KERNELS + SERVED + SHARING + ANSWERS + LAB
