"""``forward`` for steps in which requests read or change activations, in pure functions."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.attention.kv_cache import KVCache
from jaxllm.config.plan import EnginePlan
from jaxllm.layers.taps import Edits, Reads, TapArrays, Taps
from jaxllm.models.params import Params
from jaxllm.runner.row_layout import RowBuffers
from jaxllm.runner.step import (
    StepProgram,
    StepSlots,
    feed,
    padded_hidden,
    step_attention,
    step_slots,
)
from jaxllm.taps.interventions import MAX_VECTORS

MIB = 2**20
# Entries that one run of a program reads. A step that wants more runs again.
_MOST_VECTORS, _MOST_LENS, _MOST_PROBS = 256, 64, 64
_BYTES = 16 * MIB  # of each kind; of probabilities four times that, in which keys are many


@dataclass(frozen=True, slots=True)
class TapSizes:
    vectors: int
    lens: int
    probs: int
    keys: int  # of an entry of probs, for each head

    @classmethod
    def of(cls, plan: EnginePlan, max_blocks: int) -> "TapSizes":
        """``max_blocks``: entries of a block table, which a plan that was settled may not need."""
        model, keys = plan.model, max_blocks * plan.block_size

        def count(most: int, num_bytes: int, each: int) -> int:
            return max(1, min(most, num_bytes // (4 * each)))

        return cls(
            count(_MOST_VECTORS, _BYTES, model.hidden_size),
            count(_MOST_LENS, _BYTES, model.vocab_size),
            count(_MOST_PROBS, 4 * _BYTES, model.num_heads * keys),
            keys,
        )

    def num_bytes(self, plan: EnginePlan) -> int:
        """Of what a run reads."""
        model = plan.model
        values = self.vectors * model.hidden_size + self.lens * model.vocab_size
        return 4 * (values + self.probs * model.num_heads * self.keys)


def tapped_forward(
    params: Params,
    kv: KVCache,
    rows: RowBuffers,
    packed: Int[Array, " B"],
    edits: Edits,
    reads: Reads,
    *,
    program: StepProgram,
    sizes: TapSizes,
) -> tuple[KVCache, RowBuffers, Float[Array, "R V"], StepSlots, Float[Array, "H E"], TapArrays]:
    """As ``forward``, and what was read."""
    views = program.layout.views(packed)
    tokens, rows = feed(rows, _uncounted(views, reads.again, rows), program)
    attend = step_attention(rows.state, views, program)
    model = program.model.merge(params)
    config = program.model.config
    nothing = TapArrays(
        jnp.zeros((sizes.vectors, config.hidden_size), jnp.float32),
        jnp.zeros((sizes.lens, config.hidden_size), jnp.float32),
        jnp.zeros((sizes.probs, config.num_heads, sizes.keys), jnp.float32),
    )
    taps = Taps(
        config.num_layers,
        jnp.int32(0),
        views.rows[views.token_slots],
        views.positions,
        edits,
        reads,
        nothing,
    )
    hidden, kv, taps = model.tapped(tokens, views.positions, kv, attend, taps)
    logits = model.compute_logits(hidden[views.logits_index])
    assert taps is not None
    found = taps.found
    lens = model.compute_logits(model.norm(found.lens.astype(hidden.dtype)))
    found = TapArrays(found.vectors, lens, found.probs)
    return kv, rows, logits, step_slots(views), padded_hidden(hidden, program), found


def _uncounted(views: SimpleNamespace, again: Int[Array, ""], rows: RowBuffers) -> SimpleNamespace:
    """Penalties must see a step's tokens once."""
    positions = jnp.where(again > 0, -1, views.positions)
    reset_rows = jnp.where(again > 0, rows.last_token.shape[0], views.reset_rows)
    return SimpleNamespace(**vars(views) | {"positions": positions, "reset_rows": reset_rows})


def set_edits(edits: Edits, row: Int[Array, ""], values: Edits) -> Edits:
    """``values``: of one row, without the first axis."""
    return jax.tree.map(lambda all_rows, one: all_rows.at[row].set(one), edits, values)


def edits_spec(plan: EnginePlan) -> Edits:
    """Shapes and dtypes of all rows, as an Edits of ShapeDtypeStructs."""
    model, rows = plan.model, plan.max_num_seqs + 1
    slots = (rows, MAX_VECTORS)

    def spec(shape: tuple[int, ...], dtype: type) -> Array:
        return jax.ShapeDtypeStruct(shape, dtype)  # pyright: ignore[reportReturnType]

    return Edits(
        spec(slots, jnp.int32),
        spec(slots, jnp.int32),
        spec(slots, jnp.int32),
        spec(slots, jnp.bool_),
        spec((*slots, model.hidden_size), jnp.float32),
        spec((rows, model.num_layers, model.num_heads), jnp.bool_),
    )


def reads_spec(num_layers: int, sizes: TapSizes) -> Reads:
    shapes = ((2, sizes.vectors), (2, sizes.lens), (2, sizes.probs), (num_layers + 1,))
    specs = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (*shapes, ()))
    return Reads(*specs)  # pyright: ignore[reportArgumentType]
