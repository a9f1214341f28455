"""Host side of the rows: what each row's request needs, and the patches that bring the device up
to date.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice

import numpy as np

from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler_output import NewRow, SchedulerOutput
from jaxllm.grammar.compiler import GrammarCompiler
from jaxllm.grammar.matcher import GrammarMatcher
from jaxllm.grammar.thoughts import ThoughtGate
from jaxllm.messages import EngineCoreRequest
from jaxllm.runner.row_layout import RowLayout
from jaxllm.runner.tapping import TapRows
from jaxllm.sampling.metadata import SamplerMode
from jaxllm.sampling.rng import seed_words
from jaxllm.sampling.token_mask import RowMask
from jaxllm.sampling_params import SamplingParams

_MODES = tuple(SamplerMode)  # each does what those before it do
_TINY = float(np.finfo(np.float32).tiny)


class Patches:
    """Pending writes to the row state: flat index (row * width + column) -> int32 value.

    A dict, because a scatter with two writes to one cell has no defined winner; here the later one
    wins.
    """

    def __init__(self) -> None:
        self._pending: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def write(self, start: int, values: Iterable[int]) -> None:
        self._pending.update(enumerate(values, start))

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Remove and return up to ``count`` writes: indices and values."""
        index = list(islice(self._pending, count))
        return index, [self._pending.pop(key) for key in index]


class RowState:
    """Owner of per-row host state. ``masked`` and ``logprobs``: does the row want them?"""

    def __init__(
        self,
        layout: RowLayout,
        max_num_seqs: int,
        vocab_size: int,
        grammars: GrammarCompiler | None = None,
        taps: TapRows | None = None,
        *,
        jumps: bool = True,
    ):
        self.layout = layout
        self.taps = taps
        self._grammars, self._jumps = grammars, jumps
        self.vocab_size = vocab_size
        self.scratch_row = max_num_seqs
        rows = max_num_seqs + 1
        self.num_cells = rows * layout.width
        self.masked = np.zeros(rows, np.bool_)
        self.logprobs = np.zeros(rows, np.bool_)
        self._modes = np.zeros(rows, np.int8)  # places in _MODES
        self.token_ids: list[np.ndarray] = [np.zeros(0, np.int32)] * rows
        self.first_known = [0] * rows  # position of the first of token_ids
        self.scored_end = np.zeros(rows, np.int32)  # prompt_logprobs: positions below it are scored
        self.numbered_end = np.zeros(rows, np.int32)  # tokens below it bring numbers of their own
        self._numbers: list[dict[str, np.ndarray]] = [{}] * rows
        self.embed_end = np.zeros(rows, np.int32)  # length of a prompt whose embedding is wanted
        self.masks: dict[int, RowMask] = {}
        self.resets: list[int] = []  # rows whose token counts must be cleared
        self._skipped: list[tuple[int, bool, np.ndarray]] = []  # see take_skipped
        self.patches = Patches()

    def apply(self, plan: SchedulerOutput) -> None:
        """Take in a step's diff: rows that entered, blocks that were appended."""
        for new in plan.new_rows:
            self._enter(new)
        width, table = self.layout.width, self.layout.block_table
        for row, start, token_ids in plan.known_tokens:
            self.token_ids[row], self.first_known[row] = np.asarray(token_ids, np.int32), start
        for row, index, block in plan.new_blocks:
            self.patches.write(row * width + table + index, (block,))

    def take_skipped(self) -> list[tuple[int, bool, np.ndarray]]:
        """(row, whether they are output, token ids) that penalties must know of and no step feeds,
        since their keys and values were found in the cache. To be counted once the row's counts
        have been cleared.
        """
        skipped, self._skipped = self._skipped, []
        return skipped

    def scores_prompts(self, plan: SchedulerOutput) -> bool:
        """Whether the step feeds positions whose prompt log-probabilities are wanted."""
        return bool((plan.starts < self.scored_end[plan.rows]).any())

    def numbered(self, plan: SchedulerOutput) -> list[int]:
        """Slots of rows that feed tokens for which their request has brought numbers."""
        if not self.layout.tokens:
            return []
        return np.flatnonzero(plan.starts < self.numbered_end[plan.rows]).tolist()

    def embeds(self, plan: SchedulerOutput) -> bool:
        """Whether the step feeds the last token of a prompt whose embedding is wanted."""
        return bool((plan.starts + plan.num_new_tokens == self.embed_end[plan.rows]).any())

    def taps_of(self, plan: SchedulerOutput) -> TapRows | None:
        """Where a row of the step reads or changes activations."""
        if self.taps is None or not self.taps.used[plan.rows].any():
            return None
        return self.taps

    def mode_of(self, plan: SchedulerOutput) -> SamplerMode:
        """The least that serves every row."""
        return _MODES[int(self._modes[plan.rows].max())]

    def masks_of(self, plan: SchedulerOutput) -> list[tuple[int, RowMask]]:
        """(slot, mask) of every slot that samples under one."""
        slots = np.flatnonzero(self.masked[plan.rows] & plan.samples)
        return [(slot, self.masks[int(plan.rows[slot])]) for slot in slots.tolist()]

    def _enter(self, new: NewRow) -> None:
        request, params, row = new.request, new.request.sampling_params, new.row
        self.token_ids[row], self.first_known[row] = np.asarray(new.token_ids, np.int32), 0
        self.masked[row] = _masked(request)
        self.logprobs[row] = params.logprobs is not None
        self._modes[row] = _MODES.index(_mode(params, self.masked[row]))
        scored = params.prompt_logprobs is not None
        self.scored_end[row] = len(request.prompt_token_ids) - 1 if scored else 0
        self.embed_end[row] = len(request.prompt_token_ids) if params.embed else 0
        if self.taps is not None:
            self.taps.enter(row, request)
        self.masks.pop(row, None)
        if self.masked[row]:
            words, thoughts = request.bad_words_token_ids, self._gate(request)
            grammar = self._matcher(request) if thoughts is None else None
            allowed = params.allowed_token_ids
            jumps = self._jumps and not (params.taps or params.interventions)
            mask = RowMask(self.vocab_size, allowed, words, grammar, thoughts, jumps=jumps)
            mask.position = len(request.prompt_token_ids)
            mask.extend(new.token_ids[len(request.prompt_token_ids) :])
            self.masks[row] = mask
        if _penalised(params):
            self.resets.append(row)
            skipped = self.token_ids[row][: new.num_computed]
            parts = np.split(skipped, [len(request.prompt_token_ids)])
            self._skipped += [(row, bool(i), part) for i, part in enumerate(parts) if part.size]
        self._patch_params(row, request)

    def _matcher(self, request: EngineCoreRequest) -> GrammarMatcher | None:
        if not request.grammar:
            return None
        return GrammarMatcher(self._compiler, request.grammar)

    def _gate(self, request: EngineCoreRequest) -> ThoughtGate | None:
        if request.thoughts is None:
            return None
        grammar = partial(GrammarMatcher, self._compiler, request.grammar)
        ends = request.eos_token_ids
        bytes_of = self._compiler.bytes_of
        return ThoughtGate(request.thoughts, bytes_of, grammar if request.grammar else None, ends)

    @property
    def _compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            raise InvariantError("A request has a grammar, but the engine has no compiler.")
        return self._grammars

    def numbers(self, row: int) -> list[np.ndarray]:
        """What the row's request brought of its first tokens, float32, for each of the layout's
        ``tokens``."""
        brought, nothing = self._numbers[row], np.zeros(0, np.float32)
        return [brought.get(param.name, nothing) for param in self.layout.tokens]

    def _patch_params(self, row: int, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        seed_high, seed_low = seed_words(params.seed or 0)
        stop_ids = () if params.min_tokens == 0 else _stop_ids(request)
        bias = params.logit_bias or {}
        prompt_len = len(request.prompt_token_ids)
        values = {
            "temperature": _bits(0.0 if params.greedy else params.temperature),
            "top_k": params.top_k,
            "top_p": _bits(max(params.top_p, _TINY)),  # 0 would keep no token at all
            "min_p": _bits(params.min_p),
            "presence_penalty": _bits(params.presence_penalty),
            "frequency_penalty": _bits(params.frequency_penalty),
            "repetition_penalty": _bits(params.repetition_penalty),
            "seed_high": seed_high,
            "seed_low": seed_low,
            "prompt_len": prompt_len,
            "stop_ban_end": prompt_len + min(params.min_tokens, request.max_tokens),
            "num_stop_ids": len(stop_ids),
            "num_bias": len(bias),
        }
        start, layout = row * self.layout.width, self.layout
        self.patches.write(start, [values[name] for name in layout.columns])
        self.patches.write(start + layout.stop_ids, stop_ids)
        self.patches.write(start + layout.bias_ids, bias)
        self.patches.write(start + layout.bias_values, map(_bits, bias.values()))
        brought = params.attention_params or {}
        self._numbers[row] = {
            param.name: np.asarray(brought[param.name], np.float32)
            for param in layout.tokens
            if param.name in brought
        }
        self.numbered_end[row] = max(map(len, self._numbers[row].values()), default=0)
        cells = [
            (param.check(brought[param.name], 1) if param.name in brought else param.value(1))
            .reshape(-1)
            .view(np.int32)
            for param in layout.attention
        ]
        if cells:
            self.patches.write(start + layout.attention_params, np.concatenate(cells).tolist())


def _masked(request: EngineCoreRequest) -> bool:
    allowed = request.sampling_params.allowed_token_ids
    by_tokens = request.bad_words_token_ids or request.grammar or request.thoughts
    return allowed is not None or bool(by_tokens)


def _mode(params: SamplingParams, masked: bool) -> SamplerMode:
    wants_more = params.logit_bias or params.min_tokens > 0 or params.logprobs is not None
    if wants_more or masked or _penalised(params):
        return SamplerMode.FULL
    return SamplerMode.GREEDY if params.greedy else SamplerMode.RANDOM


def _penalised(params: SamplingParams) -> bool:
    offsets = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    return offsets or params.repetition_penalty != 1.0


def _stop_ids(request: EngineCoreRequest) -> tuple[int, ...]:
    eos = () if request.sampling_params.ignore_eos else request.eos_token_ids
    return tuple(dict.fromkeys((*eos, *(request.sampling_params.stop_token_ids or ()))))


def _bits(value: float) -> int:
    """A float32's bits as an int32."""
    return int(np.float32(value).view(np.int32))
