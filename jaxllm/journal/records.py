"""What a journal holds: a Header, then what happened to the engine core, in order.

Arrays are raw little-endian numbers. Rows of a step are not named by request: who is in a row
follows from the ``new_rows`` before.
"""

import msgspec
import numpy as np

from jaxllm.config.plan import EnginePlan
from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core.disk_tier import DiskNews
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.messages import EngineCoreRequest

VERSION = 1


class Header(msgspec.Struct, frozen=True, tag="header"):
    """All that the scheduler's decisions depend on beside what follows."""

    plan: EnginePlan
    async_scheduling: bool
    scheduling: SchedulingConfig = SchedulingConfig()
    version: int = VERSION
    jaxllm: str = ""  # the version that wrote it
    model: str = ""  # as the user named it
    wall_time: float = 0.0  # seconds since 1970 at ``clock``
    clock: float = 0.0  # the engine's; all other times are on it
    cache_key: bytes = b""  # for the hashes of blocks, where files are named by them


class Added(msgspec.Struct, frozen=True, tag="add"):
    time: float
    request: EngineCoreRequest


class Aborted(msgspec.Struct, frozen=True, tag="abort"):
    time: float
    request_ids: tuple[str, ...]


class Decided(msgspec.Struct, frozen=True, tag="decide"):
    """The engine core's next turn has begun, and this is its step. Fields are SchedulerOutput's."""

    time: float
    step_id: int
    bucket: int  # index in plan.buckets
    num_decode_rows: int
    rows: bytes  # int32 [n]
    starts: bytes  # int32 [n]
    num_new_tokens: bytes  # int32 [n]
    samples: bytes  # bool [n]
    new_rows: tuple[tuple[int, str, int], ...] = ()  # row, request id, tokens known
    new_blocks: bytes = b""  # int32 [k, 3]: row, index in its block table, block id
    # row, position of the first, token ids
    known_tokens: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    block_saves: tuple[tuple[int, int], ...] = ()  # block, slot of the host's memory
    block_copies: tuple[tuple[int, int], ...] = ()  # from, to
    block_loads: tuple[tuple[int, int], ...] = ()  # slot, block
    block_writes: tuple[tuple[int, bytes], ...] = ()  # index in block_saves, name
    finished_rows: tuple[int, ...] = ()
    token_limit: int | None = None  # given to the scheduler


class Waited(msgspec.Struct, frozen=True, tag="wait"):
    """The engine core's next turn has begun, without a step of its own."""

    time: float
    token_limit: int | None = None


class Fetched(msgspec.Struct, frozen=True, tag="fetch"):
    """Results of the oldest step in flight."""

    time: float
    step_id: int
    token_ids: bytes  # int32 [n], aligned with the step's rows
    finite: bytes = b""  # bool [n]; empty: all are
    forced: tuple[tuple[int, tuple[int, ...]], ...] = ()  # entry, token ids


class Heard(msgspec.Struct, frozen=True, tag="hear"):
    """What had become of files, before the next turn."""

    time: float
    news: DiskNews


class Failed(msgspec.Struct, frozen=True, tag="fail"):
    """The dispatch of the step just decided, or the fetch of the oldest in flight, raised."""

    time: float
    where: str  # dispatch | fetch
    error: str


class Full(msgspec.Struct, frozen=True, tag="full"):
    """The journal has reached its size; what came after is not recorded."""

    time: float


Record = Header | Added | Aborted | Heard | Decided | Waited | Fetched | Failed | Full


def decided(
    step: SchedulerOutput, plan: EnginePlan, time: float, token_limit: int | None = None
) -> Decided:
    return Decided(
        time=time,
        step_id=step.step_id,
        bucket=plan.buckets.index(step.bucket),
        num_decode_rows=int(step.num_decode_rows),
        rows=int32_bytes(step.rows),
        starts=int32_bytes(step.starts),
        num_new_tokens=int32_bytes(step.num_new_tokens),
        samples=step.samples.tobytes(),
        new_rows=tuple((n.row, n.request.request_id, len(n.token_ids)) for n in step.new_rows),
        new_blocks=int32_bytes(np.array(step.new_blocks)) if step.new_blocks else b"",
        known_tokens=step.known_tokens,
        block_saves=step.block_saves,
        block_copies=step.block_copies,
        block_loads=step.block_loads,
        block_writes=step.block_writes,
        finished_rows=step.finished_rows,
        token_limit=token_limit,
    )


def fetched(output: ModelRunnerOutput, time: float) -> Fetched:
    """Tokens, forced ones, and which rows were finite: all that decisions depend on."""
    finite = b"" if output.finite.all() else output.finite.tobytes()
    return Fetched(time, output.step_id, int32_bytes(output.token_ids), finite, output.forced)


def int32_bytes(array: np.ndarray) -> bytes:
    return array.astype("<i4", copy=False).tobytes()


def int32s(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i4").astype(np.int32)
