"""Host side of taps: what rows want, in as many runs of a step as it takes. NumPy only, but for
the forms that programs take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.config.plan import EnginePlan
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.layers.taps import Edits, Reads, TapArrays
from jaxllm.messages import EngineCoreRequest, TapValue
from jaxllm.runner.tapped_step import TapSizes
from jaxllm.taps.interventions import MAX_VECTORS, AblateHead, Intervention, Patch
from jaxllm.taps.positions import TapPositions, tapped_between
from jaxllm.taps.sites import Site, TapShapes, parse_site


@dataclass(frozen=True, slots=True)
class TapEntry:
    slot: int  # entry of the step's rows
    token: int  # of the step
    position: int
    site: Site


@dataclass(frozen=True, slots=True)
class TapRun:
    """What one run of a step's program reads."""

    vectors: Sequence[TapEntry]
    lens: Sequence[TapEntry]
    probs: Sequence[TapEntry]
    reads: Reads


@dataclass(frozen=True, slots=True)
class _Wish:
    sites: tuple[Site, ...]
    positions: TapPositions
    prompt_len: int


@dataclass(slots=True)
class TapRows:
    """Owner of what rows read and change. ``used``: whether a row does either."""

    shapes: TapShapes
    sizes: TapSizes
    used: np.ndarray  # bool, by row
    _wishes: dict[int, _Wish] = field(default_factory=dict[int, _Wish])
    _edited: set[int] = field(default_factory=set[int])
    _changes: dict[int, Edits] = field(default_factory=dict[int, Edits])

    @classmethod
    def of(cls, plan: EnginePlan, shapes: TapShapes, max_blocks: int) -> "TapRows":
        return cls(shapes, TapSizes.of(plan, max_blocks), np.zeros(plan.max_num_seqs + 1, np.bool_))

    def enter(self, row: int, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        self._wishes.pop(row, None)
        if params.taps:
            sites = tuple(parse_site(name) for name in params.taps)
            length = len(request.prompt_token_ids)
            self._wishes[row] = _Wish(sites, params.tap_positions, length)
        changed = params.interventions or ()
        self.used[row] = bool(params.taps or changed)
        if changed or row in self._edited:
            self._changes[row] = row_edits(changed, self.shapes)
        (self._edited.add if changed else self._edited.discard)(row)

    def take_changes(self) -> dict[int, Edits]:
        """By row, what programs must be told before the next step."""
        changes, self._changes = self._changes, {}
        return changes

    def runs(self, plan: SchedulerOutput) -> list[TapRun]:
        """At least one, which may read nothing."""
        entries: list[TapEntry] = []
        ends = np.cumsum(plan.num_new_tokens)
        for slot in np.flatnonzero(self.used[plan.rows]).tolist():
            wish = self._wishes.get(int(plan.rows[slot]))
            if wish is None:
                continue
            start, count = int(plan.starts[slot]), int(plan.num_new_tokens[slot])
            first = int(ends[slot]) - count - start  # token of the step at position 0
            for position in tapped_between(wish.positions, wish.prompt_len, start, start + count):
                entries += [TapEntry(slot, first + position, position, site) for site in wish.sites]
        vectors = [entry for entry in entries if entry.site.kind in ("resid", "attn_out")]
        lens = [entry for entry in entries if entry.site.kind == "logits"]
        probs = [entry for entry in entries if entry.site.kind == "attn_probs"]
        sizes = (self.sizes.vectors, self.sizes.lens, self.sizes.probs)
        parts = [
            [found[i : i + size] for i in range(0, len(found), size)]
            for found, size in zip((vectors, lens, probs), sizes, strict=True)
        ]
        return [
            self._run(*(part[i] if i < len(part) else [] for part in parts), again=i > 0)
            for i in range(max(1, *map(len, parts)))
        ]

    def idle_run(self) -> TapRun:
        return self._run([], [], [], again=False)

    def _run(
        self,
        vectors: list[TapEntry],
        lens: list[TapEntry],
        probs: list[TapEntry],
        *,
        again: bool,
    ) -> TapRun:
        layers = self.shapes.num_layers
        probs = sorted(probs, key=lambda entry: entry.site.number)
        numbers = [entry.site.number for entry in probs]
        starts: Any = np.searchsorted(numbers, np.arange(layers + 1)).astype(np.int32)
        codes = [e.site.number + (layers + 1) * (e.site.kind == "attn_out") for e in vectors]
        reads = Reads(
            _entries(vectors, codes, self.sizes.vectors),
            _entries(lens, [entry.site.number for entry in lens], self.sizes.lens),
            _entries(probs, numbers, self.sizes.probs),
            starts,
            np.int32(again),  # pyright: ignore[reportArgumentType]
        )
        return TapRun(vectors, lens, probs, reads)


def values_of(runs: Sequence[tuple[TapRun, TapArrays]]) -> dict[int, list[TapValue]]:
    """What a step has read, by entry of its rows."""
    found: dict[int, list[TapValue]] = {}
    for run, arrays in runs:
        for entries, values in (
            (run.vectors, arrays.vectors),
            (run.lens, arrays.lens),
            (run.probs, arrays.probs),
        ):
            host = np.asarray(values) if entries else None
            for entry, value in zip(entries, host if host is not None else (), strict=False):
                if entry.site.kind == "attn_probs":
                    value = value[:, : entry.position + 1]
                data = value.astype("<f4").tobytes()
                item = TapValue(entry.site.name, entry.position, data)
                found.setdefault(entry.slot, []).append(item)
    return found


def row_edits(changed: Sequence[Intervention], shapes: TapShapes) -> Edits:
    """What a row's request changes, in the order in which it is done: arrays of one row."""
    site, first, last = np.zeros((3, MAX_VECTORS), np.int32)
    replaces = np.zeros(MAX_VECTORS, np.bool_)
    vector = np.zeros((MAX_VECTORS, shapes.hidden_size), np.float32)
    ablated = np.zeros((shapes.num_layers, shapes.num_heads), np.bool_)
    slot = 0
    for item in changed:
        if isinstance(item, AblateHead):
            ablated[item.layer, item.head] = True
            continue
        assert isinstance(item.vector, bytes)
        numbers, site[slot] = np.frombuffer(item.vector, "<f4"), item.layer + 1
        if isinstance(item, Patch):
            first[slot] = last[slot] = item.position
            replaces[slot], vector[slot] = True, numbers
        else:
            first[slot], last[slot] = item.first, item.last
            vector[slot] = np.float32(item.coefficient) * numbers
        slot += 1
    arrays: Any = (site, first, last, replaces, vector, ablated)
    return Edits(*arrays)


def _entries(entries: Sequence[TapEntry], codes: Sequence[int], size: int) -> Any:
    out = np.zeros((2, size), np.int32)
    out[1] = -1
    out[0, : len(entries)] = [entry.token for entry in entries]
    out[1, : len(entries)] = codes
    return out
