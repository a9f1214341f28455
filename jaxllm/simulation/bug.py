"""A bug to be planted: text of the real source, and what takes its place."""

from dataclasses import dataclass

CORE, ENGINE, JOURNAL = "jaxllm.core", "jaxllm.engine", "jaxllm.journal"
SCHEDULER, COMMIT = f"{CORE}.scheduler", f"{CORE}.commit"
POOL, TABLES, ROWS = f"{CORE}.block_pool", f"{CORE}.kv_cache_manager", f"{CORE}.row_table"
REQUEST, QUEUE, STOP = f"{CORE}.request", f"{CORE}.policies.fcfs", f"{CORE}.stop"
SHARES, FORCED = f"{CORE}.prefill_shares", f"{CORE}.forced_tokens"
HASHES, HOST, SPARING = f"{CORE}.prefix_cache", f"{CORE}.host_tier", f"{CORE}.sparing"
PRIORITY, FAIR, WAY = f"{CORE}.policies.priority", f"{CORE}.policies.fair", f"{CORE}.making_way"
ASIDE = f"{CORE}.standing_aside"
BUCKETS, LOGPROBS = f"{CORE}.buckets", f"{CORE}.logprobs"
LOOP, RECOVERY = f"{ENGINE}.engine_core", f"{ENGINE}.recovery"


@dataclass(frozen=True, slots=True)
class Bug:
    """``answers``: it must be found without a recount of the books, by what clients get;
    every second run is one of ``scenario``.
    """

    name: str
    module: str
    old: str
    new: str
    answers: bool = True
    scenario: str = "random"
