"""Columns of the row state: everything a request keeps on the device, as one int32 row.

One array means one kind of update: a list of (row, column, value) patches, whatever changed.
Floats are stored by their bits.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.sampling.metadata import SamplingMetadata
from jaxllm.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from pallas_kernels.attention.variant import Param

SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed_high",
    "seed_low",
    "prompt_len",
    "stop_ban_end",
    "num_stop_ids",
    "num_bias",
)
MAX_EOS_IDS = 16
MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + MAX_EOS_IDS  # the request's own and the model's


@dataclass(frozen=True)
class RowLayout:
    """``max_blocks``: entries of a block table. ``attention``: what requests may bring for
    attention variants, ``tokens`` of every token: these travel with steps."""

    max_blocks: int
    attention: tuple[Param, ...] = ()
    tokens: tuple[Param, ...] = ()

    @cached_property
    def columns(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(SCALARS)}

    @property
    def stop_ids(self) -> int:
        return len(SCALARS)

    @property
    def bias_ids(self) -> int:
        return self.stop_ids + MAX_STOP_IDS

    @property
    def bias_values(self) -> int:
        return self.bias_ids + MAX_LOGIT_BIAS

    @property
    def block_table(self) -> int:
        return self.bias_values + MAX_LOGIT_BIAS

    @property
    def attention_params(self) -> int:
        return self.block_table + self.max_blocks

    @property
    def width(self) -> int:
        return self.attention_params + sum(param.size or 1 for param in self.attention)

    def ints(self, state: Int[Array, "R C"], name: str) -> Int[Array, " R"]:
        return state[:, self.columns[name]]

    def floats(self, state: Int[Array, "R C"], name: str) -> Float[Array, " R"]:
        return lax.bitcast_convert_type(self.ints(state, name), jnp.float32)

    def block_tables(self, state: Int[Array, "R C"]) -> Int[Array, "R M"]:
        return state[:, self.block_table : self.attention_params]

    def row_params(self, state: Int[Array, "R C"]) -> dict[str, Array]:
        """[R], or [R, size], of every param in its dtype."""
        params: dict[str, Array] = {}
        start = self.attention_params
        for param in self.attention:
            size = param.size or 1
            cells = state[:, start : start + size]
            cells = cells if param.size is not None else cells[:, 0]
            is_float = param.dtype == "float32"
            params[param.name] = lax.bitcast_convert_type(cells, jnp.float32) if is_float else cells
            start += size
        return params

    def has_penalty(self, state: Int[Array, "R C"]) -> Array:
        """bool [R]"""
        return (
            (self.floats(state, "presence_penalty") != 0.0)
            | (self.floats(state, "frequency_penalty") != 0.0)
            | (self.floats(state, "repetition_penalty") != 1.0)
        )

    def sampling(self, state: Int[Array, "R C"], position: Int[Array, " R"]) -> SamplingMetadata:
        """``position`` of the token that will be sampled, per row."""
        bias = state[:, self.bias_values : self.bias_values + MAX_LOGIT_BIAS]
        return SamplingMetadata(
            temperature=self.floats(state, "temperature"),
            top_k=self.ints(state, "top_k"),
            top_p=self.floats(state, "top_p"),
            min_p=self.floats(state, "min_p"),
            presence_penalty=self.floats(state, "presence_penalty"),
            frequency_penalty=self.floats(state, "frequency_penalty"),
            repetition_penalty=self.floats(state, "repetition_penalty"),
            seed=jnp.stack([self.ints(state, "seed_high"), self.ints(state, "seed_low")], axis=1),
            position=position,
            stop_ban_end=self.ints(state, "stop_ban_end"),
            num_stop_ids=self.ints(state, "num_stop_ids"),
            stop_ids=state[:, self.stop_ids : self.stop_ids + MAX_STOP_IDS],
            num_bias=self.ints(state, "num_bias"),
            bias_ids=state[:, self.bias_ids : self.bias_ids + MAX_LOGIT_BIAS],
            bias_values=lax.bitcast_convert_type(bias, jnp.float32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowBuffers:
    """State of all rows on the device; donated to every step. S = max_num_seqs + 1: the last row is
    where padding slots point."""

    state: Int[Array, "S C"]  # see RowLayout
    last_token: Int[Array, " S"]  # sampled last; the next decode step feeds it
    output_counts: Int[Array, "S V"]  # int16; only kept for rows with penalties
    prompt_seen: Array  # bool [S, V]; likewise


def row_buffers_spec(layout: RowLayout, max_num_seqs: int, vocab_size: int) -> RowBuffers:
    """Shapes and dtypes, as a RowBuffers of ShapeDtypeStructs."""
    rows = max_num_seqs + 1

    def spec(shape: tuple[int, ...], dtype: type) -> Array:
        return jax.ShapeDtypeStruct(shape, dtype)  # pyright: ignore[reportReturnType]

    return RowBuffers(
        spec((rows, layout.width), jnp.int32),
        spec((rows,), jnp.int32),
        spec((rows, vocab_size), jnp.int16),
        spec((rows, vocab_size), jnp.bool_),
    )
