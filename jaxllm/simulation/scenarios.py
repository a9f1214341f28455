"""What a run may be like: ``SCENARIOS``, one entry each. The rest is drawn from a seed."""

from dataclasses import dataclass
from random import Random
from typing import override

from jaxllm.config.plan import BatchBucket, EnginePlan
from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.engine.latency_target import LatencyTarget
from jaxllm.simulation.plans import make_plan


class RandomLimit(LatencyTarget):
    """Any limit at all is to be survived."""

    def __init__(self, random: Random, most: int = 70):
        self._random, self._most = random, most
        self.last: int | None = None

    @override
    def observe(self, bucket: BatchBucket, seconds: float) -> None:
        return None

    @property
    @override
    def token_limit(self) -> int | None:
        self.last = self._random.randint(0, self._most)
        return self.last


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Rates are per step of the engine; tuples are choices."""

    about: str
    prompts: str = "mixed"  # a key of traffic.PROMPTS
    arrivals: float = 0.3
    burst: tuple[int, ...] = (1,)  # prompts that come together
    backlog: int = 8  # open requests beyond the rows, above which nobody comes
    aborts: float = 0.01
    deaths: float = 0.0  # of the engine process
    transient: float = 0.0  # steps that fail for no request's fault
    bad: float = 0.0  # share of requests that fail: steps that raise, logits that are NaN
    policies: tuple[str, ...] = ("fcfs",)
    journals: float = 0.0  # share of engines whose journal is replayed when they end
    limits: float = 0.2  # share of engines whose steps are limited, at random
    priorities: tuple[int, ...] = (0,)
    tenants: tuple[str, ...] = ("",)
    salts: tuple[str, ...] = ("", "", "", "salt")
    host: tuple[float, ...] = (0.0, 0.3, 2.0)  # blocks on the host, as a share of those beside it
    files: float = 0.0  # share of runs whose blocks get files, where the host has room for any
    scored: float = 0.1  # share of requests that ask for log-probabilities
    forced: float = 0.1  # share of requests with a grammar that forces tokens
    max_model_len: tuple[int, ...] = (12, 24, 40)
    max_num_seqs: tuple[int, ...] = (1, 3, 5, 8)
    max_num_batched_tokens: tuple[int, ...] = (8, 9, 16, 64)
    block_size: tuple[int, ...] = (1, 2, 4, 8)
    pool: tuple[float, ...] = (0.15, 0.3, 0.6, 1.0)  # blocks, as a share of what full rows need

    def scheduling(self, random: Random) -> SchedulingConfig:
        return SchedulingConfig(
            policy=random.choice(self.policies),
            tenant_weights=("a=3", "b=0.5"),
            long_prefill_token_threshold=random.choice((None, 1, 5)),
        )

    def limit(self, random: Random) -> RandomLimit | None:
        return RandomLimit(random) if random.random() < self.limits else None

    def plan(self, random: Random) -> EnginePlan:
        """Mostly enough blocks for the longest request, at times for half of it: then some are
        refused.
        """
        max_model_len, rows = random.choice(self.max_model_len), random.choice(self.max_num_seqs)
        block_size = random.choice(self.block_size)
        longest = -(-max_model_len // block_size)
        least = max(1, longest // 2) if random.random() < 0.2 else longest
        blocks = max(least, round(random.choice(self.pool) * longest * rows))
        return make_plan(
            max_model_len=max_model_len,
            max_num_seqs=rows,
            max_num_batched_tokens=random.choice(self.max_num_batched_tokens),
            block_size=block_size,
            num_blocks=1 + blocks,
            prefix_caching=random.random() < 0.9,
            host_blocks=round(random.choice(self.host) * blocks),
            offloading=random.random() < 0.5,
            kv_files=self.files > 0 and random.random() < self.files,
        )


SCENARIOS = {
    "random": Scenario(about="a bit of everything that a healthy device sees"),
    "faults": Scenario(
        about="steps that raise, rows of NaN",
        transient=0.02,
        bad=0.1,
        aborts=0.05,
        host=(0.0, 2.0),
        pool=(0.15, 0.6),
    ),
    "limits": Scenario(
        about="steps that are limited below what they could hold",
        limits=1.0,
        prompts="long-beside-short",
        journals=1.0,
        max_model_len=(96, 160),
        max_num_batched_tokens=(128, 256),
        block_size=(8,),
    ),
    "cancels": Scenario(about="clients leave all the time", aborts=0.3, arrivals=0.6),
    "pressure": Scenario(
        about="the pool is a tenth of the demand",
        pool=(0.1,),
        max_num_seqs=(8, 12),
        max_num_batched_tokens=(16, 64),
        prompts="short",
        arrivals=1.0,
        backlog=4,
        scored=0.3,
    ),
    "bursts": Scenario(about="nobody, then everybody", arrivals=0.02, burst=(4, 16, 40), backlog=0),
    "long-beside-short": Scenario(
        about="prefills in many chunks beside decoding rows",
        prompts="long-beside-short",
        max_model_len=(64, 96),
        max_num_batched_tokens=(8, 16),
        block_size=(4, 8),
    ),
    "conversations": Scenario(
        about="prompts that begin as earlier ones, and their answers, did",
        prompts="conversation",
        max_model_len=(40, 64),
    ),
    "system-prompts": Scenario(
        about="texts with common beginnings, under pressure",
        prompts="shared",
        pool=(0.2, 0.5),
        tenants=("", "", "t"),
    ),
    "branches": Scenario(
        about="many continuations of one beginning",
        prompts="branches",
        block_size=(2, 8),
        pool=(0.3, 1.0),
        salts=("",),
    ),
    "siblings": Scenario(about="n completions of one prompt", prompts="siblings"),
    "aside": Scenario(
        about="siblings of prompts that take many steps, where leaders leave and steps fail",
        prompts="siblings",
        max_model_len=(40,),
        max_num_batched_tokens=(8, 9),
        aborts=0.05,
        transient=0.01,
        policies=("fcfs", "priority", "fair"),
        priorities=(0, 0, 1),
        tenants=("a", "b"),
        journals=0.2,
    ),
    "priorities": Scenario(
        about="requests of unequal priority", priorities=(-1, 0, 0, 3), policies=("priority",)
    ),
    "tenants": Scenario(
        about="fair shares",
        policies=("fair",),
        tenants=("a", "b", "c"),
        arrivals=0.7,
        backlog=150,
        max_num_seqs=(1, 3),
        max_model_len=(12, 24),
        aborts=0.002,
    ),
    "nan-rows": Scenario(about="many requests with bad logits", bad=0.3, transient=0.001),
    "journals": Scenario(
        about="every engine writes a journal, whatever befalls it",
        journals=1.0,
        deaths=0.005,
        transient=0.01,
        bad=0.05,
        aborts=0.05,
        policies=("fcfs", "priority", "fair"),
        priorities=(0, 0, 1),
        tenants=("a", "b"),
        limits=1.0,
    ),
    "forced-tokens": Scenario(
        about="grammars that leave no choice, under pressure",
        forced=0.8,
        journals=0.3,
        pool=(0.15, 0.3, 1.0),
        policies=("fcfs", "priority", "fair"),
        priorities=(0, 0, 1),
        tenants=("a", "b"),
    ),
    "files": Scenario(
        about="blocks on file that are slow, damaged or gone; engines that die and find them again",
        prompts="shared",
        files=1.0,
        host=(0.2, 0.6),
        deaths=0.003,
        transient=0.002,
        aborts=0.03,
        arrivals=0.5,
        journals=0.3,
        policies=("fcfs", "fcfs", "priority", "fair"),
        priorities=(0, 0, 1),
        tenants=("a", "a", "b"),
        salts=("",),
        max_model_len=(24, 40),
        block_size=(2, 4),
        pool=(0.15,),
    ),
    "deaths": Scenario(about="the engine process dies; clients ask again", deaths=0.01),
}
