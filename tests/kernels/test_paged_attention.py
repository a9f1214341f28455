"""The page-walking XLA form against the dense float32 oracle, on random non-contiguous pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import xla
from pallas_kernels.attention.reference import paged_attention_reference
from pallas_kernels.attention.xla_queries import make_tile_map
from pallas_kernels.kv_write.narrow import FP8, narrow, widened
from pallas_kernels.kv_write.xla import kv_write

# Compiled whole: operation by operation it takes several times as long.
oracle = jax.jit(paged_attention_reference, static_argnames=("scale", "window"))
paged_decode = jax.jit(xla.paged_decode, static_argnames=("scale", "window"))
paged_prefill = jax.jit(xla.paged_prefill, static_argnames=("scale", "window", "group"))
tile_map = jax.jit(make_tile_map, static_argnums=2)

SHAPES = [  # heads, kv heads, head dim, page size
    (4, 4, 16, 16),
    (9, 3, 64, 64),
    (8, 2, 32, 32),
    (8, 1, 128, 16),
    (3, 3, 8, 256),  # pages larger than an iteration
]


class Batch:
    """Slot 0 decodes, slot 1 continues a prompt, slot 2 starts one, slot 3 is padding."""

    def __init__(self, heads: int, kv_heads: int, dim: int, page: int, pages: str = "float32"):
        rng = np.random.default_rng(heads * dim)
        pages_per_row, rows = -(-160 // page), 4
        num_pages = rows * pages_per_row + 1
        kv = rng.normal(size=(num_pages, 2, kv_heads, page, dim)).astype(np.float32)
        kv[0] = np.nan  # the null page: reading it must never matter
        self.kv = narrow(jnp.asarray(kv), pages)
        order = rng.permutation(num_pages - 1) + 1
        tables = order[: 3 * pages_per_row].reshape(3, pages_per_row)
        self.block_tables = jnp.asarray(
            np.vstack([tables, np.zeros((1, pages_per_row))]).astype(np.int32)
        )
        starts, counts = (130, 61, 0), (1, 70, 33)
        tokens = 128
        self.positions_np = np.full(tokens, -1, np.int32)
        self.slots = np.zeros(tokens, np.int32)
        loc = [0]
        for slot, (start, count) in enumerate(zip(starts, counts, strict=True)):
            self.positions_np[loc[-1] : loc[-1] + count] = np.arange(start, start + count)
            self.slots[loc[-1] : loc[-1] + count] = slot
            loc.append(loc[-1] + count)
        self.used = loc[-1]
        self.query_start_loc = jnp.asarray([*loc, loc[-1]], jnp.int32)
        self.positions = jnp.asarray(self.positions_np)
        self.q = jnp.asarray(rng.normal(size=(tokens, heads, dim)).astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "window", "pages"),
    [
        *((shape, None, "float32") for shape in SHAPES),
        *((SHAPES[2], window, "float32") for window in (1, 20, 100)),
        (SHAPES[2], 20, FP8),
    ],
    ids=str,
)
def test_prefill_and_decode_equal_the_reference(
    shape: tuple[int, int, int, int], window: int | None, pages: str
) -> None:
    batch = Batch(*shape, pages)
    scale = shape[2] ** -0.5
    want = oracle(
        batch.q,
        batch.kv,
        batch.block_tables,
        jnp.asarray(batch.slots),
        batch.positions,
        scale=scale,
        window=window,
    )
    lens = jnp.asarray([131, 0, 0, 0], jnp.int32)
    decoded = paged_decode(
        batch.q[:4], batch.kv, batch.block_tables, lens, scale=scale, window=window
    )
    np.testing.assert_allclose(decoded[0], want[0], atol=2e-5)
    assert not np.asarray(decoded[1:]).any()
    for group in (1, 3):
        tiles = tile_map(batch.query_start_loc, jnp.int32(1), len(batch.positions_np))
        got = paged_prefill(
            batch.q,
            batch.kv,
            batch.block_tables,
            batch.positions,
            tiles,
            jnp.zeros_like(batch.q),
            scale=scale,
            window=window,
            group=group,
        )
        np.testing.assert_allclose(got[1 : batch.used], want[1 : batch.used], atol=2e-5)
        assert not np.asarray(got[batch.used :]).any(), "padding must not be attended"
        assert not np.asarray(got[0]).any(), "decode rows are not the tiles' business"


def test_permuting_pages_changes_nothing() -> None:
    batch = Batch(8, 2, 32, 32)
    order = np.random.default_rng(3).permutation(batch.kv.shape[0] - 1) + 1
    order = np.concatenate([[0], order])
    inverse = np.argsort(order).astype(np.int32)
    lens = jnp.asarray([131, 131, 33, 0], jnp.int32)
    want = paged_decode(batch.q[:4], batch.kv, batch.block_tables, lens, scale=0.2)
    moved = jnp.asarray(inverse)[batch.block_tables]
    got = paged_decode(batch.q[:4], batch.kv[order], moved, lens, scale=0.2)
    np.testing.assert_array_equal(got, want)


def test_stale_nan_past_the_end_of_a_row_is_not_read() -> None:
    """Blocks are reused without being cleared; a former owner's NaN must not reach the next one."""
    batch = Batch(4, 4, 16, 16)
    last_page = int(batch.block_tables[0, 130 // 16])
    poisoned = batch.kv.at[last_page, :, :, 131 % 16 :].set(jnp.nan)
    lens = jnp.asarray([131, 0, 0, 0], jnp.int32)
    got = paged_decode(batch.q[:4], poisoned, batch.block_tables, lens, scale=0.25)
    assert np.isfinite(np.asarray(got)).all()


def test_what_eight_bits_do_not_hold_becomes_the_nearest_that_they_do() -> None:
    kv = jnp.zeros((2, 2, 1, 4, 8), FP8)
    k = jnp.asarray([[[0.1, 447.0, 449.0, -1e9, jnp.inf, -jnp.inf, 1e-9, 20.0]]], jnp.bfloat16)
    page = jnp.ones(1, jnp.int32)
    got = np.asarray(widened(kv_write(kv, k, -k, page, page), jnp.float32))
    want = np.array([0.1015625, 448, 448, -448, 448, -448, 0, 20], np.float32)
    np.testing.assert_array_equal(got[1, 0, 0, 1], want)
    np.testing.assert_array_equal(got[1, 1, 0, 1], -want)


def test_eight_bits_are_written_and_read_without_a_second_cache() -> None:
    """XLA would make a wide one to scatter into float8, or to gather from it."""
    kv = jax.ShapeDtypeStruct((4097, 2, 2, 16, 8), FP8)
    tokens, index = jax.ShapeDtypeStruct((4, 2, 8), jnp.bfloat16), jnp.zeros(4, jnp.int32)

    def step(kv: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        kv = kv_write(kv, k, k, index, index)
        return kv, paged_decode(k, kv, jnp.zeros((4, 9), jnp.int32), index, scale=0.1)

    memory = jax.jit(step, donate_argnums=0).lower(kv, tokens).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == kv.size
    assert memory.temp_size_in_bytes < kv.size / 10


def test_write_puts_tokens_into_their_pages_and_drops_padding() -> None:
    rng = np.random.default_rng(0)
    kv = jnp.asarray(rng.normal(size=(5, 2, 3, 4, 8)).astype(np.float32))
    k, v = (jnp.asarray(rng.normal(size=(3, 3, 8)).astype(np.float32)) for _ in "kv")
    pages, offsets = jnp.asarray([2, 5, 4], jnp.int32), jnp.asarray([3, 0, 0], jnp.int32)
    got = np.asarray(kv_write(kv, k, v, pages, offsets))
    want = np.array(kv)
    want[2, 0, :, 3], want[2, 1, :, 3] = k[0], v[0]
    want[4, 0, :, 0], want[4, 1, :, 0] = k[2], v[2]
    np.testing.assert_array_equal(got, want)
