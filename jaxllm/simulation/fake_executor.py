"""An Executor without a device: a cache of (token, position) pairs behind real block tables."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from jaxllm.config.plan import EnginePlan
from jaxllm.core.block_pool import NULL_BLOCK
from jaxllm.core.scheduler_output import NewRow, SchedulerOutput
from jaxllm.core.spans import span_of
from jaxllm.engine.executor import LogprobArrays, ModelRunnerOutput
from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import MAX_LOGPROBS
from jaxllm.simulation.fake_files import FakeFiles
from jaxllm.simulation.hash_model import forced_tokens, is_forced, next_token, score
from jaxllm.simulation.violation import Violation

# Given the number of the dispatch and the step: "dispatch" or "fetch" if it is to raise there.
Fault = Callable[[int, SchedulerOutput], str | None]


class DeviceError(RuntimeError):
    """What the fake raises on an injected fault."""


@dataclass
class FakeRow:
    request: EngineCoreRequest
    token_ids: tuple[int, ...]
    identity: int  # of what keys and values depend on beside tokens, and of who may share
    table: list[int] = field(default_factory=list)
    last_token: int | None = None  # sampled in this row, still "on the device"
    first_known: int = 0  # position of the first of token_ids
    length: int = 0  # tokens that there are, sampled and forced ones too


class FakeExecutor:
    """Runs each step at dispatch, gives its results at fetch, in order.

    ``not_finite`` maps a request id to the context length from which its logits are NaN.
    After a fault the cache is gone: whatever follows fails until ``reset``.
    """

    def __init__(
        self,
        plan: EnginePlan,
        fault: Fault = lambda number, step: None,
        not_finite: dict[str, int] | None = None,
        files: FakeFiles | None = None,
    ):
        self.plan = plan
        self.fault = fault
        self.files = files
        # The caller's own, who may add to it.
        self.not_finite = {} if not_finite is None else not_finite
        self.num_dispatched = 0
        self.num_resets = 0
        self.steps: list[SchedulerOutput] = []
        self.reset()
        self.num_resets = 0

    def reset(self) -> None:
        self.rows: dict[int, FakeRow] = {}
        shape = (self.plan.num_blocks, self.plan.block_size, 3)  # token, position, whose
        self.kv = np.full(shape, -1, np.int32)
        self.host: dict[int, np.ndarray] = {}
        if self.files is not None:
            self.files.forget()
        self.pending: deque[int] = deque()
        self.broken = False
        self.num_resets += 1

    def dispatch(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        where = self.fault(self.num_dispatched, plan)
        self.num_dispatched += 1
        self.steps.append(plan)
        self.broken |= where is not None
        if where == "dispatch":
            raise DeviceError("injected at dispatch")
        self.pending.append(plan.step_id)
        return None if self.broken else self._run(plan)

    def keep(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        for block_id, name in blocks:
            if self.files is not None:
                self.files.write(name, self.kv[block_id].copy())

    def fetch(self, handle: ModelRunnerOutput | None) -> ModelRunnerOutput:
        if handle is None:
            raise DeviceError("injected at fetch")
        if self.pending.popleft() != handle.step_id:
            raise Violation("executor", "Steps are fetched out of order.")
        return handle

    def _follow(self, step: SchedulerOutput) -> None:
        """Whatever a step changes before its first write."""
        for row in step.finished_rows:
            del self.rows[row]
        for new in step.new_rows:
            self._join(new)
        for number, position, token_ids in step.known_tokens:
            self.rows[number].token_ids, self.rows[number].first_known = token_ids, position
        for row, index, block_id in step.new_blocks:
            if index != len(self.rows[row].table):
                raise Violation("executor", "A block table has a gap.")
            self.rows[row].table.append(block_id)
        for slot, content in () if self.files is None else self.files.contents():
            self.host[slot] = content
        for index, name in step.block_writes:
            if self.files is None:
                raise Violation("executor", "There are no files to write to.")
            self.files.write(name, self.kv[step.block_saves[index][0]].copy())
        for block_id, slot in step.block_saves:
            self.host[slot] = self.kv[block_id].copy()
        if step.block_copies:
            sources, targets = np.array(step.block_copies).T
            self.kv[targets] = self.kv[sources]
        for slot, block_id in step.block_loads:
            self.kv[block_id] = self.host[slot]

    def _run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self._follow(step)
        n = step.rows.size
        tokens, finite = np.full(n, -7, np.int32), np.ones(n, bool)
        asked = [self.rows[number].request.sampling_params for number in step.rows.tolist()]
        sampled = empty_logprobs(n) if any(p.logprobs is not None for p in asked) else None
        scores_prompt = any(p.prompt_logprobs is not None for p in asked)
        prompt = empty_logprobs(step.num_tokens) if scores_prompt else None
        offset, forced = 0, dict[int, tuple[int, ...]]()
        ends = (step.starts + step.num_new_tokens).tolist()
        for i, number in enumerate(step.rows.tolist()):
            decodes = i < step.num_decode_rows
            self._write(self.rows[number], int(step.starts[i]), ends[i], from_device=decodes)
        for i, number in enumerate(step.rows.tolist()):
            row, start, end = self.rows[number], int(step.starts[i]), ends[i]
            context = self._read(row, end)
            finite[i] = end < self.not_finite.get(row.request.request_id, end + 1)
            if prompt is not None and row.request.sampling_params.prompt_logprobs is not None:
                for position in range(start, end):
                    following = (*row.token_ids, 0)[min(position + 1, len(row.token_ids))]
                    self._score(
                        prompt, offset + position - start, context[: position + 1], following
                    )
            if step.samples[i] and end == row.length:
                tokens[i] = self._sample(row, context)
                if is_forced(row.request):
                    forced[i] = forced_tokens(end, int(tokens[i]), self.plan.model.vocab_size)
                    row.length += len(forced[i])
                if sampled is not None:
                    self._score(sampled, i, context, int(tokens[i]))
            elif step.samples[i]:
                if not is_forced(row.request):
                    raise Violation("executor", "A row samples before it was fed all it knows.")
                tokens[i] = 0  # its place is taken
            offset += end - start
        if (self.kv[NULL_BLOCK] != -1).any():
            raise Violation("executor", "The null block was written.")
        return ModelRunnerOutput(
            step.step_id,
            tokens,
            finite,
            sampled,
            prompt,
            step.bucket.num_tokens,
            forced=tuple((entry, ids) for entry, ids in forced.items() if ids),
        )

    def _sample(self, row: FakeRow, context: np.ndarray) -> int:
        seed = row.request.sampling_params.seed or 0
        row.last_token = next_token(context, seed, self.plan.model.vocab_size)
        row.length += 1
        return row.last_token

    def _join(self, new: NewRow) -> None:
        if new.row in self.rows:
            raise Violation("executor", f"Row {new.row} is taken.")
        self.rows[new.row] = FakeRow(
            new.request, new.token_ids, self._identity(new.request), length=len(new.token_ids)
        )

    def _write(self, row: FakeRow, start: int, end: int, *, from_device: bool) -> None:
        if from_device and row.last_token is None:
            raise Violation("executor", "A decode row feeds a token that was never sampled.")
        known = slice(start - row.first_known, end - row.first_known)
        fed = (row.last_token or 0,) if from_device else row.token_ids[known]
        if len(fed) != end - start:
            raise Violation("executor", "Tokens are fed that nobody knows.")
        if start < span_of(row.request, self.plan.attention_params) > end:
            raise Violation("executor", "Tokens are fed that see others which are not there.")
        for position, token in zip(range(start, end), fed, strict=True):
            block_id = row.table[position // self.plan.block_size]
            self.kv[block_id, position % self.plan.block_size] = token, position, row.identity

    def _read(self, row: FakeRow, length: int) -> np.ndarray:
        num_blocks = -(-length // self.plan.block_size)
        entries = self.kv[row.table[:num_blocks]].reshape(-1, 3)[:length]
        if (entries[:, 2] != row.identity).any():
            raise Violation("cache", f"{row.request.request_id} reads what is not for it.")
        return entries[:, :2]

    def _identity(self, request: EngineCoreRequest) -> int:
        tenant = "" if self.plan.prefix_cache_scope == "all" else request.tenant
        params = request.sampling_params
        ahead = request.prompt_token_ids[: span_of(request, self.plan.attention_params)]
        brought = sorted((params.attention_params or {}).items())
        changed = (brought, params.interventions or None, ahead)
        return crc32(repr((tenant, request.cache_salt, *changed)).encode()) & 0x7FFFFFFF

    def _score(self, arrays: LogprobArrays, entry: int, context: np.ndarray, token_id: int) -> None:
        logprob, rank, top_ids, top_logprobs = score(context, token_id, self.plan.model.vocab_size)
        arrays.token_logprobs[entry] = logprob
        arrays.ranks[entry] = rank
        arrays.top_ids[entry] = top_ids
        arrays.top_logprobs[entry] = top_logprobs


def empty_logprobs(n: int) -> LogprobArrays:
    return LogprobArrays(
        token_logprobs=np.full(n, np.nan, np.float32),
        ranks=np.zeros(n, np.int32),
        top_ids=np.zeros((n, MAX_LOGPROBS), np.int32),
        top_logprobs=np.zeros((n, MAX_LOGPROBS), np.float32),
    )
