"""``python -m jaxllm.worker --fd N --generation G``: started by EngineProcess, never by hand."""

import argparse
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

from jaxllm.config.engine import EngineConfig
from jaxllm.worker.serve_loop import run_worker

if TYPE_CHECKING:
    from jaxllm.worker.wiring import BuiltEngine


def _build(config: EngineConfig) -> "BuiltEngine":
    from jaxllm.worker.wiring import build_engine  # JAX starts here, and may fail here

    return build_engine(config)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxllm.worker")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    parser.add_argument("--generation", type=int, required=True, help="number of this engine")
    args = parser.parse_args()
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s engine: %(message)s",
    )
    for library in ("jax", "absl", "orbax"):  # they tell their life story at INFO
        logging.getLogger(library).setLevel(logging.WARNING)
    os.set_inheritable(args.fd, False)  # a compiler we start must not keep the socket open
    return run_worker(socket.socket(fileno=args.fd), args.generation, _build)


if __name__ == "__main__":
    sys.exit(main())
