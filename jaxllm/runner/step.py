"""The step: the only computation on the serving path, in pure functions.

``forward`` patches the rows, runs the model and gives logits; ``sample`` turns them into tokens
that stay on the device for the next step. They are two programs, dispatched back to back: so there
is one ``forward`` per bucket and one ``sample`` per number of rows instead of their product, and a
mask that the host fills while ``forward`` runs takes the same path as everything else. ``score``
follows ``forward`` when prompt log-probabilities are wanted, and ``embed`` when embeddings are:
hidden states have one shape for all mixed buckets, so there is one of each. No step without such
wishes holds a branch or a loop whose condition the host would have to read: the device never waits
for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.attention.backend import AttentionBackend, AttentionSpec
from jaxllm.attention.kv_cache import KVCache
from jaxllm.attention.metadata import AttentionMetadata, StepAttention
from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.models.params import ModelDef, Params
from jaxllm.runner.row_layout import RowBuffers, RowLayout
from jaxllm.runner.step_layout import StepLayout
from jaxllm.sampling.logprobs import prompt_logprobs
from jaxllm.sampling.metadata import Logprobs, SamplerMode, SamplerOutput
from jaxllm.sampling.sampler import full_tokens, greedy_tokens, random_tokens


@dataclass(frozen=True)
class StepProgram:
    """Everything static about one compiled step."""

    model: ModelDef
    backend: AttentionBackend
    rows: RowLayout
    bucket: BatchBucket
    block_size: int
    hidden_tokens: int = 0  # hidden states of a mixed step are padded to so many

    @cached_property
    def layout(self) -> StepLayout:
        return StepLayout(self.bucket, self.block_size, len(self.rows.tokens))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepSlots:
    """What ``sample`` and ``embed`` need of the step's metadata; R depends on the bucket's rows
    only.
    """

    rows: Int[Array, " R"]  # permanent row of each slot
    seq_lens: Int[Array, " R"]  # = position of the token to be sampled
    samples: Bool[Array, " R"]  # False: a prefill chunk that is not the last, or padding
    last: Int[Array, " R"]  # the slot's last token, as index of the step's


def forward(
    params: Params,
    kv: KVCache,
    rows: RowBuffers,
    packed: Int[Array, " B"],
    *,
    program: StepProgram,
) -> tuple[KVCache, RowBuffers, Float[Array, "R V"], StepSlots, Float[Array, "H E"]]:
    """Returns the cache and rows (updated in place when donated), float32 logits, what ``sample``
    takes, and what ``score`` and ``embed`` take: final hidden states."""
    views = program.layout.views(packed)
    tokens, rows = feed(rows, views, program)
    attend = step_attention(rows.state, views, program)
    model = program.model.merge(params)
    hidden, kv = model(tokens, views.positions, kv, attend)
    logits = model.compute_logits(hidden[views.logits_index])
    return kv, rows, logits, step_slots(views), padded_hidden(hidden, program)


def padded_hidden(hidden: Float[Array, "T E"], program: StepProgram) -> Float[Array, "H E"]:
    """Some microseconds of a mixed step, where ``score`` would be a program for every bucket."""
    missing = max(program.hidden_tokens - hidden.shape[0], 0)
    return jnp.pad(hidden, ((0, missing), (0, 0))) if missing else hidden


def feed(
    rows: RowBuffers, views: SimpleNamespace, program: StepProgram
) -> tuple[Int[Array, " T"], RowBuffers]:
    """The step's tokens, and the rows patched and told of them."""
    state = _patch(rows.state, views)
    tokens = jnp.where(
        views.token_ids < 0, rows.last_token[views.rows[views.token_slots]], views.token_ids
    )
    if program.bucket.kind is BatchKind.MIXED:
        rows = _clear_counts(rows, views)
    counts, seen = _count_tokens(rows, state, tokens, views, program.rows)
    return tokens, RowBuffers(state, rows.last_token, counts, seen)


def step_attention(
    state: Int[Array, "S C"], views: SimpleNamespace, program: StepProgram
) -> StepAttention:
    metadata = AttentionMetadata(
        positions=views.positions,
        token_slots=views.token_slots,
        query_start_loc=views.query_start_loc,
        seq_lens=views.seq_lens,
        block_tables=program.rows.block_tables(state[views.rows]),
        num_decode_rows=views.num_decode_rows[0],
        row_params=program.rows.row_params(state[views.rows]),
        token_params=_token_params(views, program),
    )
    return StepAttention.bind(
        program.backend,
        metadata,
        program.bucket.kind,
        AttentionSpec.all_of(program.model.config),
        program.block_size,
    )


def _token_params(views: SimpleNamespace, program: StepProgram) -> dict[str, Array]:
    """What requests brought of the step's tokens, by name; nothing in a pure decode step."""
    if not views.token_params.shape[0]:
        return {}
    params = program.rows.tokens
    bits = views.token_params.reshape(len(params), -1)
    values = lax.bitcast_convert_type(bits, jnp.float32)
    return {param.name: value for param, value in zip(params, values, strict=True)}


def score(
    params: Params,
    hidden: Float[Array, "H E"],
    start: Int[Array, ""],
    targets: Int[Array, " C"],
    *,
    model: ModelDef,
) -> Logprobs:
    """Log-probabilities of the tokens ``targets`` after the step's tokens from ``start`` on."""
    part = jax.lax.dynamic_slice_in_dim(hidden, start, targets.shape[0])
    return prompt_logprobs(model.merge(params), part, targets)


def embed(hidden: Float[Array, "H E"], slots: StepSlots) -> Float[Array, "R E"]:
    """The final hidden state of each slot's last token, scaled to length 1. Meant where that token
    ends a prompt."""
    last = hidden[slots.last].astype(jnp.float32)
    length = jnp.linalg.norm(last, axis=-1, keepdims=True)
    return last / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)


def sample(
    rows: RowBuffers,
    logits: Float[Array, "R V"],
    slots: StepSlots,
    mask: Int[Array, "R W"],
    *,
    layout: RowLayout,
    mode: SamplerMode,
    platform: str,
) -> tuple[RowBuffers, SamplerOutput]:
    """Draws one token per slot and leaves it in ``rows.last_token`` where the slot samples.
    ``platform`` as in pallas_kernels' ``sample``."""
    metadata = layout.sampling(rows.state[slots.rows], slots.seq_lens)
    match mode:
        case SamplerMode.GREEDY:
            out = greedy_tokens(logits, platform=platform)
        case SamplerMode.RANDOM:
            out = random_tokens(logits, metadata, platform=platform)
        case SamplerMode.FULL:
            counts, seen = rows.output_counts[slots.rows], rows.prompt_seen[slots.rows]
            out = full_tokens(logits, metadata, counts, seen, mask, platform=platform)
    target = jnp.where(slots.samples, slots.rows, rows.last_token.shape[0])
    last_token = rows.last_token.at[target].set(out.token_ids, mode="drop")
    return RowBuffers(rows.state, last_token, rows.output_counts, rows.prompt_seen), out


def step_slots(views: SimpleNamespace) -> StepSlots:
    return StepSlots(views.rows, views.seq_lens, views.samples > 0, views.logits_index)


def _patch(state: Int[Array, "S C"], views: SimpleNamespace) -> Int[Array, "S C"]:
    flat = state.reshape(-1).at[views.patch_index].set(views.patch_value, mode="drop")
    return flat.reshape(state.shape)


def _clear_counts(rows: RowBuffers, views: SimpleNamespace) -> RowBuffers:
    """Forget the tokens of former owners; entries of ``reset_rows`` past the last row are
    padding.
    """
    counts = rows.output_counts.at[views.reset_rows].set(jnp.int16(0), mode="drop")
    seen = rows.prompt_seen.at[views.reset_rows].set(False, mode="drop")
    return RowBuffers(rows.state, rows.last_token, counts, seen)


def _count_tokens(
    rows: RowBuffers,
    state: Int[Array, "S C"],
    tokens: Int[Array, " T"],
    views: SimpleNamespace,
    layout: RowLayout,
) -> tuple[Array, Array]:
    """Penalties see a token once it has been fed: prompt tokens as seen, output tokens as counts.

    Written before they are read in the same step, so that XLA updates the donated arrays in place.
    A count that one step more could overflow stays as it is.
    """
    counts, seen = rows.output_counts, rows.prompt_seen
    most = jnp.iinfo(counts.dtype).max - min(tokens.shape[0], 2**14)
    nowhere = counts.shape[0]
    row = views.rows[views.token_slots]
    counted = layout.has_penalty(state)[row] & (views.positions >= 0)
    in_prompt = views.positions < layout.ints(state, "prompt_len")[row]
    seen = seen.at[jnp.where(counted & in_prompt, row, nowhere), tokens].set(True, mode="drop")
    counted &= ~in_prompt & (counts[row, tokens] < most)
    counts = counts.at[jnp.where(counted, row, nowhere), tokens].add(jnp.int16(1), mode="drop")
    return counts, seen


@dataclass(frozen=True)
class HiddenShape:
    """Final hidden states as mixed steps give them: so many tokens, of which ``score`` takes
    ``scored`` at a time. Both are 0 where no step is mixed.
    """

    tokens: int
    scored: int

    @property
    def pieces(self) -> int:
        return self.tokens // self.scored if self.scored else 0

    @classmethod
    def of(cls, buckets: Iterable[BatchBucket]) -> "HiddenShape":
        mixed = [bucket.num_tokens for bucket in buckets if bucket.kind is BatchKind.MIXED]
        if not mixed:
            return cls(0, 0)
        scored = min(*mixed, 256)
        return cls(-(-max(mixed) // scored) * scored, scored)


TOKENS_PER_RECOUNT = 1024


def recount(rows: RowBuffers, packed: Int[Array, " B"]) -> RowBuffers:
    """Count tokens of a row that are never fed, since their keys and values are there already.
    ``packed``: the row, whether they are output, and token ids (padding: past the vocabulary).
    """
    row, is_output, tokens = packed[0], packed[1] > 0, packed[2:]
    counts, seen = rows.output_counts, rows.prompt_seen
    nowhere = counts.shape[0]
    seen = seen.at[jnp.where(is_output, nowhere, row), tokens].set(True, mode="drop")
    counts = counts.at[jnp.where(is_output, row, nowhere), tokens].add(jnp.int16(1), mode="drop")
    return RowBuffers(rows.state, rows.last_token, counts, seen)


def abstract_recount() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2 + TOKENS_PER_RECOUNT,), jnp.int32)


def abstract_packed(program: StepProgram) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((program.layout.size,), jnp.int32)
