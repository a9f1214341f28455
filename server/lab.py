"""``jaxllm lab``: prints what the engine's own room finds, which is imported by name: the server
brings no JAX.
"""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxllm.bench.report import check_writable, make_device_report, write_report
from jaxllm.config.engine import EngineConfig
from jaxllm.config.env import prepare_accelerator, prepare_interpreter
from jaxllm.errors import ConfigError
from jaxllm.weights.json_file import read_json_object


def run_check(variant: str, params: str | None, *, interpret: bool) -> int:
    """Print the table. Returns 1 if anything failed.

    Raises:
        ConfigError: there is no such variant, or a value does not fit it.
    """
    if interpret:
        prepare_interpreter()
    check: Any = import_module("jaxllm.lab.check")
    findings = check.check_variant(variant, _values(params), interpret=interpret)
    print("\n".join(check.table(findings)))
    return int(any(finding.ok is False for finding in findings))


def run_bench(
    variant: str,
    params: str | None,
    *,
    heads: tuple[int, int, int],
    contexts: Sequence[int] | None,
    json_path: Path | None,
) -> dict[str, Any]:
    """Print the speed beside plain causal attention; return (and write) the report. ``heads``:
    query heads, KV heads, head_dim.

    Raises:
        ConfigError: there is no such variant, a value does not fit it, or the file cannot be
            written.
    """
    check_writable(json_path)
    found = _load(variant, params, heads[0])
    speeds = _measured(found, heads, contexts)
    rows = [asdict(speed) | {"times_plain": speed.times_plain} for speed in speeds]
    shape = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    figures = {"benchmark": "lab", "variant": variant, **shape, "rows": rows}
    report = make_device_report(figures)
    device = report["device"]
    print(f"{found.name} on {device['kind']} ({device['platform']})")
    print("\n".join(import_module("jaxllm.lab.bench").table(speeds)))
    for reason in dict.fromkeys(s.refused for s in speeds if s.refused):
        print(f"not by the kernel: {reason}")
    write_report(report, json_path)
    return report


def run_show(
    variant: str,
    params: str | None,
    out: Path,
    *,
    heads: tuple[int, int, int],
    prompt: str | None,
    model: str,
    num_tokens: int,
    speed: bool,
) -> None:
    """Draw it into ``out``. With ``prompt`` the positions are its tokens by the tokenizer of
    ``model``, else ``num_tokens`` of them.

    Raises:
        ConfigError: there is no such variant, a value does not fit it, the prompt is too long to be
            drawn, or the file cannot be written.
    """
    _check_place(out)
    tokens = [] if prompt is None else _tokens(prompt, model)
    if not 1 <= (count := len(tokens) or num_tokens) <= 512:
        raise ConfigError(f"{count} tokens cannot be drawn: use 1 to 512.")
    picture: Any = import_module("jaxllm.lab.picture")
    plot: Any = import_module("jaxllm.lab.plot")
    found = _load(variant, params, heads[0])
    drawn = picture.make_picture(found, heads[0], count)
    speeds = _measured(found, heads, None) if speed else []
    sinks = "" if found.sinks is None else ", with sinks"
    plot.plot(f"{found.name}{sinks}", drawn, speeds, out, tokens)
    print(f"{out}: {found.name}, {len(drawn.heads)} kinds of heads")


def run_maps(
    variant: str,
    params: str | None,
    out: Path,
    *,
    prompt: str | None,
    model: str,
    layers: tuple[int, ...],
    settings: dict[str, Any] | None = None,
) -> None:
    """Draw where ``model`` looks in these layers when it reads ``prompt`` with the variant;
    ``settings`` are the engine's.

    Raises:
        ConfigError: there is no prompt, or no such variant or layer, the engine does not start,
            or the file cannot be written.
        InvalidRequestError: the prompt is empty, or too long to be read at once.
    """
    if prompt is None:
        raise ConfigError("--maps needs --prompt: whose tokens are attended to?")
    _check_place(out)
    maps: Any = import_module("jaxllm.lab.maps")
    plot: Any = import_module("jaxllm.lab.plot")
    chosen = {"attention": variant, "attention_params": params} | (settings or {})
    found = maps.attention_maps(model, prompt, layers, **chosen)
    plot.plot_maps(f"{model}, {variant}: square roots of attention", found, out)
    print(f"{out}: layers {', '.join(map(str, found.layers))} of {model}")


def _check_place(out: Path) -> None:
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: its directory does not exist.")


def _measured(
    variant: Any, heads: tuple[int, int, int], contexts: Sequence[int] | None
) -> list[Any]:
    if heads[0] % heads[1]:
        raise ConfigError("--num-heads must be a multiple of --num-kv-heads.")
    bench: Any = import_module("jaxllm.lab.bench")
    lengths = tuple(contexts or bench.contexts())
    with tqdm(total=2 * len(lengths), unit="shape") as bar:

        def progress(what: str) -> None:
            bar.set_description(what)
            bar.update()

        return bench.measure(variant, bench.Heads(*heads), lengths, progress)


def _load(variant: str, params: str | None, num_heads: int) -> Any:
    prepare_accelerator(EngineConfig.__dataclass_fields__["gpu_memory_utilization"].default)
    return import_module("jaxllm.lab.load").load_variant(variant, _values(params), num_heads)


def _values(params: str | None) -> dict[str, Any] | None:
    return read_json_object(Path(params)) if params is not None else None


def _tokens(prompt: str, model: str) -> list[str]:
    from jaxllm.tokenizer.tokenizer import Tokenizer
    from jaxllm.weights.resolve import resolve_model

    tokenizer = Tokenizer.from_dir(resolve_model(model).tokenizer_dir)
    return [
        tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.encode(prompt)
    ]
