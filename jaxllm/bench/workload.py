"""Seeded workloads: which prompts, and how many tokens each is to get. Knows no engine.

The same seed gives the same token ids on every machine and numpy (``RandomState``'s streams are
frozen), and greedy decoding that ignores EOS makes output lengths exact, so results of different
engines are comparable token for token. ``sha`` names a workload's content.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.errors import InvalidRequestError

LOWEST_ID, HIGHEST_ID = 1000, 120_000  # ids are in [LOWEST_ID, HIGHEST_ID)


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt ``i`` is ``prompts[i]``, answered with exactly ``output_lens[i]`` tokens."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]
    folded_to: int | None = None  # vocabulary into which the ids were folded

    @property
    def num_input_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        pairs = zip(self.prompts, self.output_lens, strict=True)
        return max(len(prompt) + length for prompt, length in pairs)

    def sha(self) -> str:
        content = json.dumps([self.prompts, self.output_lens])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def folded(self, vocab_size: int) -> "Workload":
        """The same with every id modulo ``vocab_size``, if that is too small for the ids."""
        if vocab_size >= HIGHEST_ID:
            return self
        prompts = [[token_id % vocab_size for token_id in prompt] for prompt in self.prompts]
        return replace(self, prompts=prompts, folded_to=vocab_size)

    def begun_otherwise(self, run: int, vocab_size: int) -> "Workload":
        """The same but for the first token of each prompt, which is another for every ``run`` (up
        to ``vocab_size`` of them): so no prefix of theirs was seen before.
        """
        prompts = [[(first + run) % vocab_size, *rest] for first, *rest in self.prompts]
        return replace(self, prompts=prompts)

    def describe(self) -> dict[str, Any]:
        return {
            "workload": self.name,
            "n": len(self.prompts),
            "in_tokens": self.num_input_tokens,
            "out_tokens": self.num_output_tokens,
            "in_mean": round(self.num_input_tokens / len(self.prompts), 1),
            "out_mean": round(self.num_output_tokens / len(self.prompts), 1),
            "sha": self.sha(),
        }


def workload_a(n: int = 256, input_len: int = 1024, output_len: int = 128) -> Workload:
    """Equal lengths: long prompts, short answers."""
    return Workload("a", _prompts([input_len] * n, seed=7), [output_len] * n)


def workload_b(n: int = 512, seed: int = 1234) -> Workload:
    """Lengths as in chats (ShareGPT): lognormal, clipped to 4..1024."""
    draw = np.random.RandomState(seed)
    input_lens = _lognormal_lengths(draw, n, mu=4.84, sigma=1.15)
    output_lens = _lognormal_lengths(draw, n, mu=4.80, sigma=1.0)
    return Workload("b", _prompts(input_lens, seed + 1), output_lens)


def workload_decode(n: int = 64, input_len: int = 128, output_len: int = 1024) -> Workload:
    """Equal lengths: short prompts, long answers."""
    return Workload("decode", _prompts([input_len] * n, seed=99), [output_len] * n)


def workload_random(
    n: int = 100, input_len: int = 1024, output_len: int = 128, seed: int = 0
) -> Workload:
    """Equal lengths, and a seed of one's own: what no prefix cache has seen."""
    return Workload("random", _prompts([input_len] * n, seed), [output_len] * n)


def make_workload(
    name: str,
    n: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    *,
    seed: int | None = None,
) -> Workload:
    """Workload "a", "b", "decode" or "random"; what is None is the workload's own.

    Raises:
        InvalidRequestError: no such workload, a number below 1, a length given for "b", or a seed
            for another than "random".
    """
    makers: dict[str, Callable[..., Workload]] = {
        "a": workload_a,
        "b": workload_b,
        "decode": workload_decode,
        "random": workload_random,
    }
    if name not in makers:
        raise InvalidRequestError(f"There is no workload {name!r}; there are {', '.join(makers)}.")
    if seed is not None and name != "random":
        raise InvalidRequestError(f"Workload {name} has a seed of its own.")
    given = {"n": n, "input_len": input_len, "output_len": output_len}
    given = {key: value for key, value in given.items() if value is not None}
    if min(given.values(), default=1) < 1:
        raise InvalidRequestError("Numbers of prompts and tokens must be at least 1.")
    if name == "b" and given.keys() - {"n"}:
        raise InvalidRequestError("Workload b draws its lengths; they cannot be given.")
    return makers[name](**given, **({} if seed is None else {"seed": seed}))


def _prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """One draw for all ids, cut up: a prompt depends on the lengths of those before it."""
    draw = np.random.RandomState(seed)
    ids = draw.randint(LOWEST_ID, HIGHEST_ID, size=sum(lengths), dtype=np.int64)
    ends = np.cumsum(lengths)
    return [part.tolist() for part in np.split(ids, ends[:-1])]


def _lognormal_lengths(
    draw: np.random.RandomState, n: int, mu: float, sigma: float, low: int = 4, high: int = 1024
) -> list[int]:
    lengths = np.rint(np.exp(draw.normal(mu, sigma, size=n)))
    return np.clip(lengths, low, high).astype(np.int64).tolist()
