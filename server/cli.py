"""The ``jaxllm`` command: parses arguments and hands over. Whatever is slow to import, the
subcommands import, so that --help and a wrong flag answer at once.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jaxllm
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, JaxLLMError
from server.client.options import BatchOptions, ChatOptions
from server.flags import Parser, add_flags, from_flags
from server.lab_flags import add_tools
from server.settings import ServerSettings

DEFAULT_MODEL = EngineConfig.__dataclass_fields__["model"].default
INTERRUPTED = 130  # the shell's code for a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; 2 for whatever was wrong with the arguments."""
    try:
        _check_installation()
        args = _parser().parse_args(argv)
        return args.run(args)
    except JaxLLMError as error:
        print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _check_installation() -> None:
    """``server`` is a common name: another folder called so on the path would shadow ours."""
    ours, engine = Path(__file__).resolve().parents[1], Path(jaxllm.__file__).resolve().parents[1]
    if ours != engine:
        raise ConfigError(
            f"The packages server ({ours}) and jaxllm ({engine}) come from different places. "
            "Run from another directory, or remove one of the two."
        )


def _parser() -> Parser:
    parser = Parser(prog="jaxllm", description="An LLM serving engine in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxllm {jaxllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands.add_parser("serve", help="serve a model over an OpenAI-compatible API"))
    _add_chat(commands.add_parser("chat", help="talk to a model, or a server, in the terminal"))
    _add_batch(commands.add_parser("run-batch", help="answer the requests of a file"))
    _add_plan(commands.add_parser("plan", help="what a model takes of a device's memory"))
    _add_replay(commands.add_parser("replay", help="decide again what an engine's journal holds"))
    lab = commands.add_parser("lab", help="tools for who writes an attention variant")
    add_tools(lab.add_subparsers(title="tools", metavar="TOOL", required=True))
    bench = commands.add_parser("bench", help="measure the speed of a model or a server")
    benches = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_throughput(benches.add_parser("throughput", help="many requests at once"))
    _add_latency(benches.add_parser("latency", help="time to first token, time per step"))
    _add_bench_serve(benches.add_parser("serve", help="drive a server that is running"))
    _add_startup(benches.add_parser("startup", help="from nothing to the first token"))
    _add_kernels(benches.add_parser("kernels", help="each operation beside the device's limits"))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    help_text = EngineConfig.__dataclass_fields__["model"].metadata["help"]
    parser.add_argument("model", nargs="?", help=f"{help_text} (default: {DEFAULT_MODEL})")
    add_flags(parser, "engine", EngineConfig, skip=("model",))


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "server", ServerSettings)
    _add_model(parser)
    parser.set_defaults(run=_serve)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "chat", ChatOptions)
    _add_model(parser)
    parser.set_defaults(run=_chat)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="requests, one JSON object a line (OpenAI's)")
    parser.add_argument("output", type=Path, help="results; those it has already are kept")
    add_flags(parser, "batch", BatchOptions)
    _add_model(parser)
    parser.set_defaults(run=_run_batch)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan", "Loads no weights and allocates no cache.")
    group.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="of a GPU that need not be here, such as 141GB or 80GiB; default: this device",
    )
    group.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    _add_model(parser)
    parser.set_defaults(run=_plan)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("journal", type=Path, help="written by an engine with --journal")
    parser.add_argument("--step", type=int, metavar="N", help="show this step instead")
    parser.set_defaults(run=_replay)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--workload",
        default="a",
        choices=("a", "b", "decode"),
        help="a: 1024 in, 128 out; b: lengths as in chats; decode: 128 in, 1024 out (%(default)s)",
    )
    group.add_argument("--num-prompts", type=int, metavar="INT", help="default: the workload's own")
    group.add_argument("--input-len", type=int, metavar="INT", help="of a and decode")
    group.add_argument("--output-len", type=int, metavar="INT", help="of a and decode")
    _add_json(group)
    _add_model(parser)
    parser.set_defaults(run=_throughput)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    sizes: dict[str, Any] = {"nargs": "+", "default": [1, 8], "dest": "batch_sizes"}
    group.add_argument("--batch-size", type=int, metavar="INT", **sizes)
    group.add_argument("--input-len", type=int, default=128, metavar="INT")
    group.add_argument("--output-len", type=int, default=64, metavar="INT")
    group.add_argument("--num-iters", type=int, default=3, metavar="INT")
    _add_json(group)
    _add_model(parser)
    parser.set_defaults(run=_latency)


def _add_bench_serve(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark", "$JAXLLM_API_KEY is sent as the key.")
    number: dict[str, Any] = {"type": int, "metavar": "INT"}
    group.add_argument("--base-url", default="http://127.0.0.1:8000", help="(%(default)s)")
    group.add_argument("--model", help="default: the first that the server names")
    group.add_argument("--endpoint", default="completions", choices=("chat", "completions"))
    group.add_argument(
        "--workload",
        default="random",
        choices=("a", "b", "random"),
        help="a: 1024 in, 128 out; b: lengths as in chats; random: as a, by --seed (%(default)s)",
    )
    group.add_argument("--num-prompts", **number, help="default: the workload's own")
    group.add_argument("--input-len", **number, help="of a and random")
    group.add_argument("--output-len", **number, help="of a and random")
    group.add_argument(
        "--vocab-size", **number, default=32000, help="token ids are folded into it (%(default)s)"
    )
    group.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="PER_SECOND",
        help="Poisson arrivals; inf: all at once (%(default)s)",
    )
    group.add_argument("--max-concurrency", **number, help="default: no limit")
    group.add_argument("--seed", **number, default=0, help="arrivals, and the prompts of random")
    group.add_argument("--ignore-eos", action="store_true", help="answers of exact lengths")
    group.add_argument(
        "--timeout", type=float, dest="timeout_s", metavar="SECONDS", help="per request"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="bounds on ttft, tpot, itl (every gap), e2e: requests that keep them all are good",
    )
    _add_json(group)
    parser.set_defaults(run=_bench_serve)


def _add_startup(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--num-iters", type=int, default=1, metavar="INT", help="(%(default)s)")
    time: dict[str, Any] = {"type": float, "dest": "timeout_s", "metavar": "SECONDS"}
    group.add_argument("--timeout", **time, default=1800.0, help="per start (%(default)s)")
    _add_json(group)
    _add_model(parser)
    parser.set_defaults(run=_startup)


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    names = ("decode", "prefill", "kv_write", "sampling", "norm", "gated_matmul")
    parser.add_argument("--op", nargs="+", default=names, choices=names, help="default: all")
    _add_json(parser)
    parser.set_defaults(run=_kernels)


def _add_json(group: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    help_text = "write the results there too"
    group.add_argument("--json", type=Path, dest="json_path", metavar="FILE", help=help_text)


def _of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    if args.model is None:
        print(f"jaxllm: no model named, using the default model {DEFAULT_MODEL}", file=sys.stderr)
    return from_flags(EngineConfig, args, model=DEFAULT_MODEL if args.model is None else args.model)


def _serve(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    settings = from_flags(ServerSettings, args)
    from server.serve import serve

    return serve(config, settings)


def _local_config(args: argparse.Namespace) -> EngineConfig:
    """Of the model in this process; with --url there is none, and nothing to say about it."""
    if args.url is None:
        return _engine_config(args)
    default = EngineConfig()
    given = from_flags(EngineConfig, args, model=default.model)
    if given != default:
        raise ConfigError("Flags of the engine are for a local model: leave them out with --url.")
    return default


def _chat(args: argparse.Namespace) -> int:
    config = _local_config(args)
    from server.client.chat import run_chat

    return run_chat(from_flags(ChatOptions, args), config, args.model)


def _run_batch(args: argparse.Namespace) -> int:
    config = _local_config(args)
    if args.url is not None and args.model is not None:
        raise ConfigError("The requests name their model: leave MODEL out with --url.")
    from server.client.batch import run_batch

    return run_batch(args.input, args.output, from_flags(BatchOptions, args), config)


def _plan(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from server.plan import run_plan

    run_plan(config, gpu_memory=args.gpu_memory, as_json=args.json)
    return 0


def _replay(args: argparse.Namespace) -> int:
    from server.replay import run_replay

    return run_replay(args.journal, args.step)


def _throughput(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from jaxllm.bench.throughput import run_throughput

    run_throughput(
        config, **_of(args, "workload", "num_prompts", "input_len", "output_len", "json_path")
    )
    return 0


def _latency(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from jaxllm.bench.latency import run_latency

    run_latency(
        config, **_of(args, "batch_sizes", "input_len", "output_len", "num_iters", "json_path")
    )
    return 0


def _bench_serve(args: argparse.Namespace) -> int:
    from jaxllm.bench.serve import ServeBenchOptions, run_serve

    names = (field.name for field in fields(ServeBenchOptions))
    given: dict[str, Any] = _of(args, *names) | {"goodput": tuple(args.goodput)}
    options = ServeBenchOptions(**given)
    return 1 if run_serve(options)["failed"] else 0


def _startup(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from jaxllm.bench.startup import run_startup

    run_startup(config, **_of(args, "num_iters", "timeout_s", "json_path"))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from jaxllm.bench.kernels import run_kernels

    report = run_kernels(operations=args.op, json_path=args.json_path)
    return 1 if any(row["failure"] for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
