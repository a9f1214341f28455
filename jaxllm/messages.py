"""What crosses the border between the HTTP process and the engine process.

Token ids only: text ends in jaxllm/frontend. Every message is a tagged, typed struct that
jaxllm/ipc.py encodes as msgpack and validates on arrival; there is no pickle anywhere.
"""

from collections.abc import Sequence

import msgspec

from jaxllm.config.model import RowParam
from jaxllm.sampling_params import SamplingParams
from jaxllm.taps.sites import TapShapes


class Thoughts(msgspec.Struct, frozen=True):
    """Where an answer may think before it says something; texts as the model writes them, ids as
    the tokenizer spells what is written for it.
    """

    opening: str
    closings: tuple[str, ...]
    opening_ids: tuple[int, ...]
    closing_ids: tuple[int, ...]  # a closing, and what the model writes behind it
    after_ids: tuple[int, ...] = ()  # the latter alone
    again: bool = False  # thoughts may come more than once
    begun: bool = False  # by the prompt
    budget: int | None = None  # tokens between opening and closing
    offered: bool = True  # the opening, where a grammar would allow nothing but itself


class EngineCoreRequest(msgspec.Struct, frozen=True, tag="add"):
    """One sequence to complete. ``sampling_params.n`` is 1 and its seed is set; both are the
    frontend's work.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    max_tokens: int  # resolved: never above max_model_len - len(prompt)
    eos_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""  # of its text, in llguidance's form; seen to compile
    thoughts: Thoughts | None = None  # None: nobody needs to know where they are
    priority: int = 0  # lower runs first
    arrival_time: float = 0.0
    cache_salt: str = ""  # cached prefixes are shared among requests of one salt
    tenant: str = ""  # whom fair shares count it for; never a key


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: tuple[str, ...]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish nothing, answer nothing more, exit 0."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Say something: an idle engine answers with its stats, a busy one says enough anyway."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, of the model's raw logits (before penalties and
    temperature).
    """

    token_id: int  # the sampled (or prompt) token
    logprob: float
    rank: int
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


class TapValue(msgspec.Struct, frozen=True):
    """What one tap read at one position."""

    name: str
    position: int
    data: bytes  # float32, little-endian; of attn_probs [heads, position + 1]


class EngineCoreOutput(msgspec.Struct, frozen=True):
    """All that happened to one request in one step, where it is more than a plain token."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per new token
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # positions of this chunk, without position 0
    error: str | None = None
    embedding: bytes | None = None  # float32, little-endian
    taps: tuple[TapValue, ...] = ()  # in order of positions


class Admission(msgspec.Struct, frozen=True):
    """A request was scheduled for the first time. Seconds on the engine's clock."""

    request_id: str
    queued_ts: float  # when the engine got it
    scheduled_ts: float
    num_cached_tokens: int = 0  # of its prompt


class StepOutputs(msgspec.Struct, frozen=True, tag="step"):
    """Results of one engine step.

    Columnar for the common case: request ``request_ids[i]`` got the one token ``token_ids[i]``.
    A request with anything else to say (the end, log-probabilities, an error) is in ``events``
    instead; no request is in both.
    """

    step_id: int
    request_ids: list[str] = msgspec.field(default_factory=list)
    token_ids: list[int] = msgspec.field(default_factory=list)
    events: list[EngineCoreOutput] = msgspec.field(default_factory=list)
    timestamp: float = 0.0  # when the results were there, in seconds on the engine's clock
    # Since the last such message, which is not sent where there is nothing else to tell:
    admitted: list[Admission] = msgspec.field(default_factory=list)
    num_step_tokens: list[int] = msgspec.field(default_factory=list)  # fed by each finished step


class CacheInfo(msgspec.Struct, frozen=True):
    """The KV cache. Names are vLLM's, which are labels in its metrics."""

    block_size: int  # tokens
    cache_dtype: str  # as asked for
    num_gpu_blocks: int  # that requests can have
    num_cpu_blocks: int
    enable_prefix_caching: bool
    gpu_memory_utilization: float


class ModelInfo(msgspec.Struct, frozen=True):
    """What the text side must know of the model; found out by the engine, sent once."""

    model: str  # as the user named it
    tokenizer_dir: str | None  # tokenizer.json and its companions; None: ids only (dummy weights)
    max_model_len: int
    vocab_size: int  # width of the logits
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    attention_params: tuple[RowParam, ...] = ()
    embedding_size: int = 0  # numbers in an embedding; 0: the engine was not started for them
    taps: TapShapes | None = None  # None: nor for these
    # What its makers recommend where a request does not say: fields of SamplingParams, and how
    # long an answer may become (None: as long as fits).
    sampling_defaults: dict[str, int | float] = {}  # float alone would make floats of integers
    max_new_tokens: int | None = None
    cache: CacheInfo | None = None


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    info: ModelInfo
    summary: dict[str, str | int | float] = {}  # for the log: programs, blocks, seconds


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start. ``error_type`` is a class name in jaxllm/errors.py."""

    error_type: str
    message: str


class Compilations(msgspec.Struct, frozen=True):
    """What XLA had to do since the engine process was started."""

    num_compiled: int = 0
    num_cache_hits: int = 0  # executables found in the persistent cache
    num_cache_misses: int = 0  # compiled, and added to it


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """Counts are since the engine process was started."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of blocks in use, 0..1
    num_preemptions: int
    num_steps: int
    num_corrupted: int = 0  # requests ended because no token could be drawn from their logits
    num_prefix_queries: int = 0  # tokens of admitted requests
    num_prefix_hits: int = 0  # those of them that did not have to be computed
    num_blocks_saved: int = 0  # to the host's memory
    num_blocks_loaded: int = 0  # from there
    num_blocks_on_file: int = 0  # now
    num_blocks_read: int = 0  # from files
    num_tokens: int = 0  # fed to programs
    num_token_slots: int = 0  # that these programs computed; the difference was padding
    compilations: Compilations = Compilations()


ToEngine = EngineCoreRequest | AbortRequests | Ping | Shutdown
FromEngine = StepOutputs | EngineReady | EngineFailed | EngineStats
