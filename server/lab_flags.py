"""The tools of ``jaxllm lab`` and their flags."""

import argparse
from pathlib import Path
from typing import Any

from jaxllm.config.engine import EngineConfig

DEFAULT_MODEL = EngineConfig.__dataclass_fields__["model"].default


def add_tools(tools: Any) -> None:
    """To the subparsers of ``jaxllm lab``."""
    check = tools.add_parser("check", help="does it compute the same wherever it serves?")
    _add_variant(check)
    check.add_argument(
        "--interpret", action="store_true", help="run the Hopper kernels in the interpreter too"
    )
    check.set_defaults(run=_check)

    bench = tools.add_parser("bench", help="its speed beside plain causal attention")
    _add_variant(bench)
    _add_heads(bench, (32, 8, 128))
    bench.add_argument(
        "--context", type=_count, nargs="+", metavar="INT", help="default: by device"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    bench.set_defaults(run=_bench)

    show = tools.add_parser("show", help="a picture of what it hides and changes")
    _add_variant(show)
    _add_heads(show, (4, 2, 64))
    show.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture")
    show.add_argument("--prompt", metavar="TEXT", help="its tokens stand along the axes")
    show.add_argument(
        "--model", default=DEFAULT_MODEL, help="whose tokenizer cuts the prompt (%(default)s)"
    )
    show.add_argument(
        "--num-tokens",
        type=_count,
        default=64,
        metavar="INT",
        help="without a prompt (%(default)s)",
    )
    show.add_argument("--speed", action="store_true", help="measure it as well: a minute")
    show.add_argument(
        "--maps",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="instead: where these layers of the model look when it reads the prompt",
    )
    show.set_defaults(run=_show)


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "variant", help="FILE.py:NAME, FILE.py with one variant, or a built-in's name"
    )
    parser.add_argument("--params", metavar="FILE", help="JSON file with values for its params")


def _add_heads(parser: argparse.ArgumentParser, default: tuple[int, int, int]) -> None:
    for name, value in zip(("--num-heads", "--num-kv-heads", "--head-dim"), default, strict=True):
        parser.add_argument(name, type=_count, default=value, metavar="INT", help="(%(default)s)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _heads(args: argparse.Namespace) -> tuple[int, int, int]:
    return args.num_heads, args.num_kv_heads, args.head_dim


def _check(args: argparse.Namespace) -> int:
    from server.lab import run_check

    return run_check(args.variant, args.params, interpret=args.interpret)


def _bench(args: argparse.Namespace) -> int:
    from server.lab import run_bench

    run_bench(
        args.variant, args.params, heads=_heads(args), contexts=args.context, json_path=args.json
    )
    return 0


def _show(args: argparse.Namespace) -> int:
    from server.lab import run_maps, run_show

    if args.maps:
        asked = {"prompt": args.prompt, "model": args.model, "layers": tuple(args.maps)}
        run_maps(args.variant, args.params, args.out, **asked)
        return 0
    run_show(
        args.variant,
        args.params,
        args.out,
        heads=_heads(args),
        prompt=args.prompt,
        model=args.model,
        num_tokens=args.num_tokens,
        speed=args.speed,
    )
    return 0
