"""A model run through the paged cache: the engine's model and attention, but no engine.

Pages are handed out in a shuffled order, so that a mistaken block table cannot go unnoticed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import KVCache, kv_cache_spec
from jaxllm.attention.metadata import AttentionMetadata, StepAttention
from jaxllm.attention.select import BACKENDS
from jaxllm.config.plan import BatchKind
from jaxllm.models.params import ModelDef, Params

ROWS = 2  # the row under test, and an empty one


def _step(
    params: Params,
    kv: KVCache,
    tokens: jax.Array,
    metadata: AttentionMetadata,
    *,
    model: ModelDef,
    backend: str,
    kind: BatchKind,
    block_size: int,
) -> tuple[jax.Array, KVCache]:
    specs = AttentionSpec.all_of(model.config)
    attend = StepAttention.bind(BACKENDS.load(backend), metadata, kind, specs, block_size)
    module = model.merge(params)
    hidden, kv = module(tokens, metadata.positions, kv, attend)
    return module.compute_logits(hidden), kv


class PagedForward:
    """One model with one request's worth of cache. Results are float32 on the host."""

    def __init__(
        self,
        model: ModelDef,
        params: Params,
        *,
        dtype: str = "float32",
        max_len: int = 128,
        block_size: int = 8,
        backend: str = "xla",
        pad_to: int = 64,
    ) -> None:
        """``pad_to``: whole prompts are computed in multiples of so many tokens."""
        self._params = params
        self._pad_to = pad_to
        step = partial(_step, model=model, backend=backend, block_size=block_size)
        # Bound, not static arguments: hashing a model on every call takes longer than running it.
        self._programs = {
            kind: jax.jit(partial(step, kind=kind), donate_argnames="kv") for kind in BatchKind
        }
        num_blocks = max_len // block_size
        self._cache_spec = kv_cache_spec(model.config, num_blocks + 1, block_size, dtype)
        table = np.random.RandomState(0).permutation(num_blocks) + 1  # block 0 is never owned
        self._tables = np.stack([table, np.zeros_like(table)]).astype(np.int32)
        self.reset()

    def reset(self) -> None:
        """Start a new request: an empty cache."""
        self._computed = 0
        self._kv: KVCache = tuple(jnp.zeros(spec.shape, spec.dtype) for spec in self._cache_spec)

    def logits(self, token_ids: list[int], *, chunk: int | None = None) -> np.ndarray:
        """[T, V] for a whole prompt, ``chunk`` tokens at a time (None: all). However it is cut, its
        steps are padded alike, so that there is one program for them all; single tokens decode.
        """
        self.reset()
        width = 1 if chunk == 1 else -(-len(token_ids) // self._pad_to) * self._pad_to
        size = chunk or width
        parts = [
            self.feed(token_ids[start : start + size], pad_to=width)
            for start in range(0, len(token_ids), size)
        ]
        return np.concatenate(parts)

    def feed(self, token_ids: list[int], *, pad_to: int) -> np.ndarray:
        """Logits [len(token_ids), V] of the request's next tokens."""
        count = len(token_ids)
        kind = BatchKind.DECODE if pad_to == 1 else BatchKind.MIXED
        width = max(pad_to, ROWS)
        tokens = np.zeros(width, np.int32)
        positions = np.full(width, -1, np.int32)
        slots = np.full(width, ROWS - 1, np.int32)
        tokens[:count] = token_ids
        positions[:count] = np.arange(self._computed, self._computed + count)
        slots[:count] = 0
        self._computed += count
        metadata = AttentionMetadata(
            positions=jnp.asarray(positions),
            token_slots=jnp.asarray(slots),
            query_start_loc=jnp.asarray([0, count, count], jnp.int32),
            seq_lens=jnp.asarray([self._computed, 0], jnp.int32),
            block_tables=jnp.asarray(self._tables),
            num_decode_rows=jnp.asarray(1 if kind is BatchKind.DECODE else 0, jnp.int32),
        )
        logits, self._kv = self._programs[kind](
            self._params, self._kv, jnp.asarray(tokens), metadata
        )
        return np.asarray(logits)[:count]
