"""The ``jaxllm`` command: parses arguments and hands over. Whatever is slow to import, the
subcommands import, so that --help and a wrong flag answer at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jaxllm
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, JaxLLMError
from server.flags import Parser, add_flags, from_flags

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
    bench = commands.add_parser("bench", help="measure a model's speed, without a server")
    benches = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_throughput(benches.add_parser("throughput", help="many requests at once"))
    _add_latency(benches.add_parser("latency", help="time to first token, time per step"))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    help_text = EngineConfig.__dataclass_fields__["model"].metadata["help"]
    parser.add_argument("model", nargs="?", help=f"{help_text} (default: {DEFAULT_MODEL})")
    add_flags(parser, "engine", EngineConfig, skip=("model",))


def _add_serve(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0: any free one (%(default)s)")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="default: MODEL as given"
    )
    group.add_argument(
        "--api-key", nargs="+", metavar="KEY", help="accepted keys (default: $JAXLLM_API_KEY)"
    )
    group.add_argument(
        "--insecure-no-auth", action="store_true", help="listen on a public address without a key"
    )
    group.add_argument(
        "--max-num-queued-reqs",
        type=int,
        metavar="INT",
        help="beyond them: 429 (default: no limit)",
    )
    group.add_argument(
        "--strict-params", action="store_true", help="refuse unknown request fields with 400"
    )
    group.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="debug logs every request (%(default)s)",
    )
    _add_model(parser)
    parser.set_defaults(run=_serve)


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
    group.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="INT")
    group.add_argument("--input-len", type=int, default=128, metavar="INT")
    group.add_argument("--output-len", type=int, default=64, metavar="INT")
    group.add_argument("--num-iters", type=int, default=3, metavar="INT")
    _add_json(group)
    _add_model(parser)
    parser.set_defaults(run=_latency)


def _add_json(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    if args.model is None:
        print(f"jaxllm: no model named, using the default model {DEFAULT_MODEL}", file=sys.stderr)
    return from_flags(EngineConfig, args, model=args.model or DEFAULT_MODEL)


def _serve(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from server.serve import ServeOptions, serve

    options = ServeOptions(
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name or (config.model,)),
        api_keys=tuple(args.api_key or ()),
        insecure_no_auth=args.insecure_no_auth,
        max_num_queued_reqs=args.max_num_queued_reqs,
        strict_params=args.strict_params,
        log_level=args.log_level,
    )
    return serve(config, options)


def _throughput(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from jaxllm.bench.throughput import run_throughput

    run_throughput(
        config,
        workload=args.workload,
        num_prompts=args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        json_path=args.json,
    )
    return 0


def _latency(args: argparse.Namespace) -> int:
    config = _engine_config(args)
    from jaxllm.bench.latency import run_latency

    run_latency(
        config,
        batch_sizes=args.batch_size,
        input_len=args.input_len,
        output_len=args.output_len,
        num_iters=args.num_iters,
        json_path=args.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
