"""A worker whose engine repeats the prompt; ``--model`` names the way in which it misbehaves."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import InvalidRequestError, OutOfMemoryError
from jaxllm.messages import (
    EngineCoreOutput,
    EngineCoreRequest,
    EngineStats,
    ModelInfo,
    StepOutputs,
    TokenLogprobs,
)
from jaxllm.worker.serve_loop import run_worker

EOS_ID = 257
REFUSED, POISON = 7, 8  # a prompt that starts with them is refused, or fails in its first step
DEADLY, BLOCKING = 9, 10  # or ends the process there, or never comes back


class FakeCore:
    """Every request's n-th token is the n-th of its prompt, cyclically; logprob -1, rank 1."""

    def __init__(self, step_seconds: float = 0.0):
        self.requests: dict[str, EngineCoreRequest] = {}
        self.counts: dict[str, int] = {}
        self.aborted: list[str] = []
        self.steps = 0
        self.step_seconds = step_seconds

    def add_request(self, request: EngineCoreRequest) -> None:
        if request.prompt_token_ids[0] == REFUSED:
            raise InvalidRequestError("This engine does not take such prompts.")
        self.requests[request.request_id] = request
        self.counts[request.request_id] = 0

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if self.requests.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    def close(self) -> None:
        return None

    def has_work(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.requests), 0, 0.0, 0, self.steps)

    def step(self, meanwhile: Callable[[], object] | None = None) -> StepOutputs | None:
        if meanwhile is not None:
            meanwhile()
        time.sleep(self.step_seconds)
        self.steps += 1
        out = StepOutputs(self.steps)
        for request in list(self.requests.values()):
            self._advance(request, out)
        return out if out.request_ids or out.events else None

    def _advance(self, request: EngineCoreRequest, out: StepOutputs) -> None:
        name, params, prompt = request.request_id, request.sampling_params, request.prompt_token_ids
        if prompt[0] == DEADLY:
            os._exit(9)
        if prompt[0] == BLOCKING:
            time.sleep(3600)
        if prompt[0] == POISON:
            del self.requests[name]
            out.events.append(
                EngineCoreOutput(name, finish_reason="error", error="The logits are not finite.")
            )
            return
        count = self.counts[name]
        token_id = prompt[count % len(prompt)]
        self.counts[name] = count = count + 1
        stopped = token_id in request.eos_token_ids and not params.ignore_eos
        reason = "stop" if stopped else "length" if count >= request.max_tokens else None
        if reason is not None:
            del self.requests[name]
        if reason is None and params.logprobs is None:
            out.request_ids.append(name)
            out.token_ids.append(token_id)
            return
        scored = TokenLogprobs(token_id, -1.0, 1, (token_id, 3), (-1.0, -2.0))
        out.events.append(
            EngineCoreOutput(
                name,
                (token_id,),
                finish_reason=reason,
                logprobs=() if params.logprobs is None else (scored,),
                prompt_logprobs=tuple(
                    TokenLogprobs(token_id, -0.5, 2, (3, token_id), (-0.1, -0.5))
                    for token_id in prompt[1:]
                )
                if params.prompt_logprobs is not None and count == 1
                else (),
            )
        )


@dataclass
class FakeEngine:
    core: FakeCore
    info: ModelInfo
    summary: dict[str, str | int | float] = field(default_factory=lambda: {"programs": 0})
    plan: None = None


def build_engine(config: EngineConfig) -> FakeEngine:
    info = ModelInfo(
        model=config.model,
        tokenizer_dir=config.tokenizer or "",
        max_model_len=config.max_model_len or 256,
        vocab_size=258,
        eos_token_ids=(EOS_ID,),
    )
    return FakeEngine(FakeCore(step_seconds=0.001), info)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--generation", type=int)
    args = parser.parse_args()

    def build(config: EngineConfig) -> FakeEngine:
        if config.model == "too-large":
            raise OutOfMemoryError("The model needs 80 GiB, the device has 2 GiB.")
        if config.model == "mute" or (config.model == "once" and args.generation > 1):
            os._exit(3)
        if config.model == "bug":
            raise RuntimeError("broken wiring")
        if config.model in ("slow", "late"):
            time.sleep(60 if config.model == "slow" else 1)
        engine = build_engine(config)
        if config.model == "garbage":
            engine.core.step = lambda: os.write(args.fd, b"\xff" * 64) and time.sleep(60)  # type: ignore
        if config.model == "spins":
            engine.core.step = lambda meanwhile=None: None
        if config.model == "raises":
            engine.core.step = lambda: 1 // 0  # type: ignore
        return engine

    return run_worker(socket.socket(fileno=args.fd), args.generation, build)


if __name__ == "__main__":
    sys.exit(main())
