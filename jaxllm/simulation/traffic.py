"""Who asks for what. Prompts are made by the functions in ``PROMPTS``; all else is drawn alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import msgspec

from jaxllm.frontend.parallel_sampling import fan_out
from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.plans import EOS, VOCAB_SIZE
from jaxllm.simulation.scenarios import Scenario

Prompt = tuple[int, ...]
MAX_SIBLINGS = 4
NUM_TEXTS = 3
NUM_CONVERSATIONS = 6


def _tokens(random: Random, n: int) -> Prompt:
    return tuple(byte % VOCAB_SIZE for byte in random.randbytes(n))


def _mixed(traffic: "Traffic") -> Prompt:
    random = traffic.random
    longest = traffic.max_model_len - 1
    return _tokens(random, random.randint(1, longest if random.random() < 0.5 else min(4, longest)))


def _short(traffic: "Traffic") -> Prompt:
    return _tokens(traffic.random, traffic.random.randint(1, min(4, traffic.max_model_len - 1)))


def _long_beside_short(traffic: "Traffic") -> Prompt:
    longest = traffic.max_model_len - 1
    if traffic.random.random() < 0.7:
        return _short(traffic)
    return _tokens(traffic.random, traffic.random.randint(longest // 2, longest))


def _conversation(traffic: "Traffic") -> Prompt:
    """A new turn of a conversation that was had, or a first one."""
    random = traffic.random
    past = random.choice(traffic.histories) if traffic.histories else ()
    turn = (*past, *_tokens(random, random.randint(1, 6)))
    return turn if len(turn) < traffic.max_model_len else _short(traffic)


def _shared(traffic: "Traffic") -> Prompt:
    """The beginning of one of a few texts, and something of its own, or nothing."""
    random, longest = traffic.random, traffic.max_model_len - 1
    text = random.choice(traffic.texts)[: random.randint(1, longest)]
    return (*text, *_tokens(random, random.randint(0, min(6, longest - len(text)))))


def _branches(traffic: "Traffic") -> Prompt:
    """One beginning, and then of many kinds."""
    own = _tokens(traffic.random, traffic.random.randint(1, 7))
    return (*traffic.texts[0][:4], *own)


PROMPTS: dict[str, Callable[["Traffic"], Prompt]] = {
    "mixed": _mixed,
    "short": _short,
    "long-beside-short": _long_beside_short,
    "conversation": _conversation,
    "shared": _shared,
    "branches": _branches,
    "siblings": _mixed,
}


class Traffic:
    """The clients of one run. Owns request ids."""

    def __init__(self, scenario: Scenario, max_model_len: int, random: Random):
        self.scenario = scenario
        self.max_model_len = max_model_len
        self.random = random
        self.histories: list[Prompt] = []
        self.texts = [_tokens(random, max_model_len) for _ in range(NUM_TEXTS)]
        self._num_requests = 0

    def come(self) -> list[EngineCoreRequest]:
        """Requests that arrive now, together."""
        requests: list[EngineCoreRequest] = []
        for _ in range(self.random.choice(self.scenario.burst)):
            request = self._request(PROMPTS[self.scenario.prompts](self))
            siblings = self.scenario.prompts == "siblings"
            n = self.random.randint(1, MAX_SIBLINGS) if siblings else 1
            requests += fan_out(request, n)
        return requests

    def come_again(self, request: EngineCoreRequest) -> EngineCoreRequest:
        """Whose engine died may ask again, under another name."""
        return msgspec.structs.replace(request, request_id=self._name())

    def remember(self, request: EngineCoreRequest, output: Sequence[int]) -> None:
        """A conversation may go on from here."""
        if self.scenario.prompts == "conversation":
            self.histories.append((*request.prompt_token_ids, *output))
            del self.histories[:-NUM_CONVERSATIONS]

    def _name(self) -> str:
        self._num_requests += 1
        return f"r{self._num_requests}"

    def _request(self, prompt: Prompt) -> EngineCoreRequest:
        random = self.random
        max_tokens = random.randint(0, self.max_model_len - len(prompt))
        params = SamplingParams(
            seed=random.randrange(2**40),
            max_tokens=max_tokens,
            min_tokens=random.choice((0, 0, max_tokens // 2)),
            ignore_eos=random.random() < 0.6,
            stop_token_ids=random.choice(((), (), (5, 11))),
        )
        if max_tokens == 0 or random.random() < self.scenario.scored:
            scored = random.choice((None, 0, 3)), random.choice((0, 2))
            params = replace(params, logprobs=scored[0], prompt_logprobs=scored[1])
        return EngineCoreRequest(
            request_id=self._name(),
            prompt_token_ids=prompt,
            sampling_params=params,
            max_tokens=max_tokens,
            eos_token_ids=(EOS, EOS + 1),
            grammar="forces" if random.random() < self.scenario.forced else "",
            priority=random.choice(self.scenario.priorities),
            tenant=random.choice(self.scenario.tenants),
            cache_salt=random.choice(self.scenario.salts),
        )
