"""``python -m jaxllm.grammar --fd N``: compiles grammars to see whether that goes well. Started by
GrammarChecker, never by hand; whatever a grammar does to it, nobody else notices.
"""

import argparse
import math
import random
import re
import resource
import signal
import socket
import sys
import time

import numpy as np
import psutil
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from jaxllm.errors import JaxLLMError
from jaxllm.grammar.compiler import compile_matcher
from jaxllm.grammar.convert import to_llguidance
from jaxllm.grammar.ll_tokenizer import load_ll_tokenizer
from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.grammar.verdict import CheckerReady, CheckerSetup, Verdict
from jaxllm.ipc import ChannelClosedError, SyncChannel

MAX_MEMORY = 512 * 2**20  # address space that a grammar may take beyond what is there without one
MAX_REASON_CHARS = 300
WALK_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxllm.grammar")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; the parent decides
    channel = SyncChannel(socket.socket(fileno=parser.parse_args().fd), 0)
    try:
        setup: CheckerSetup = channel.receive(CheckerSetup)
        try:
            tokenizer = load_ll_tokenizer(
                setup.tokenizer_dir, setup.vocab_size, setup.eos_token_ids
            )
        except JaxLLMError as error:
            channel.send(CheckerReady(error.message))
            return 0
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + MAX_MEMORY)
        channel.send(CheckerReady())
        while True:
            spec: StructuredOutputsParams = channel.receive(StructuredOutputsParams)
            # Should nobody be left to end us. The parent counts more closely.
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + setup.max_seconds) + 2)
            channel.send(_judge(spec, tokenizer, setup))
    except ChannelClosedError:
        return 0


def _judge(spec: StructuredOutputsParams, tokenizer: LLTokenizer, setup: CheckerSetup) -> Verdict:
    """Do what the engine will do: compile, fill masks, take tokens."""
    started = time.process_time()
    try:
        grammar = to_llguidance(spec, tokenizer)
    except JaxLLMError as error:
        return Verdict(error=error.message)
    matcher = compile_matcher(tokenizer, grammar)
    _walk(matcher, setup)
    if matcher.is_error():
        message = matcher.get_error()
        reason = "no text satisfies it" if "NoExtension" in message else _reason(message)
        return Verdict(error=spec.invalid(f"{spec.kind}: {reason}").message)
    if time.process_time() - started > setup.max_seconds:
        return Verdict(error=spec.invalid(f"{spec.kind} takes too long to compile").message)
    return Verdict(grammar)


def _walk(matcher: LLMatcher, setup: CheckerSetup) -> None:
    """Go some way, by tokens drawn with a fixed seed: some grammars show their cost only then."""
    mask = allocate_token_bitmask(1, setup.vocab_size)
    ends = np.asarray(setup.eos_token_ids)
    draw = random.Random(0)
    for _ in range(WALK_TOKENS):
        fill_next_token_bitmask(matcher, mask)
        if matcher.is_error() or matcher.is_stopped():
            return
        bits = np.unpackbits(mask[0].view(np.uint8), bitorder="little")
        bits[ends] = 0
        goes_on = np.flatnonzero(bits)
        if not goes_on.size:
            return
        matcher.consume_token(int(goes_on[draw.randrange(goes_on.size)]))


def _reason(message: str) -> str:
    """In one line; of a regex, without the picture of where in it that was."""
    if message.startswith("panic"):
        return "it is too large for the compiler"
    found = re.search(r"^error: (.*)", message, re.MULTILINE)
    text = found[1] if found else message.replace("<non-verbose/>", "")
    text = re.sub(r"\s+", " ", text).strip().rstrip(".")
    return text if len(text) <= MAX_REASON_CHARS else f"{text[:MAX_REASON_CHARS]}..."


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
