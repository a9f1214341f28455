"""Blocks of keys that a mask hides whole are not fetched by the kernels, and all others are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.page_map import PageMap, decode_map, prefill_map
from pallas_kernels.attention.prefill_sm90 import paged_prefill_sm90
from pallas_kernels.attention.prefill_specs import PrefillSpec
from pallas_kernels.attention.prefill_tiles import PrefillConfig, make_prefill_tiles
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_check import largest_error, make_case, reference
from pallas_kernels.attention.variants.block_global import BLOCK_GLOBAL
from pallas_kernels.attention.variants.prefix_lm import PREFIX_LM
from pallas_kernels.attention.xla_spans import Sight

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

PAGE, PAGES = 32, 20
BLOCKS = BLOCK_GLOBAL.bind({"block": 32, "num_global": 128})
CONFIG = PrefillConfig(block_kv=64, num_ctas=1)


def listed(found: PageMap, group: int) -> tuple[list[int], list[int]]:
    """Blocks seen in part, and whole."""
    partials, count = np.asarray(found.counts[group]).tolist()
    order = np.asarray(found.order[group]).tolist()
    return order[:partials], order[partials:count]


def test_a_decoding_row_walks_what_it_sees_in_order() -> None:
    sight = Sight(None, BLOCKS, None, PAGE, (3, PAGES))
    found = jax.jit(lambda lens: decode_map(lens, 4, sight, 64))(np.array([600, 100, 0], np.int32))
    assert listed(found, 0) == ([0, 1, 8, 9], [])  # keys to 127, and from 544 on
    assert listed(found, 1) == ([0, 1], [])
    assert listed(found, 2) == ([], [])


def tiles_of(
    variant: AttentionVariant, cached: int, new: int, prefix_len: int = 0
) -> tuple[PageMap, np.ndarray]:
    """Of one row's ``new`` tokens, and the tiles' table."""

    @jax.jit
    def found(lens: jax.Array, brought: jax.Array) -> tuple[PageMap, jax.Array]:
        start = jnp.array([0, new], jnp.int32)
        tiles = make_prefill_tiles(start, lens, jnp.int32(0), new, CONFIG)
        sight = Sight(None, variant, {"prefix_len": brought}, PAGE, (1, PAGES))
        return prefill_map(tiles, 4, sight, CONFIG), tiles.table

    page_map, table = found(np.array([cached + new], np.int32), np.array([prefix_len], np.int32))
    return page_map, np.asarray(table)


def test_a_tile_knows_what_all_of_its_queries_see() -> None:
    # The first 128 keys; and of the tile's queries 448 to 487 keys from 416 on.
    assert listed(tiles_of(BLOCKS, 448, 40)[0], 0) == ([6, 7], [0, 1])
    # A query at 64 sees of the second block its own key alone.
    assert listed(tiles_of(BLOCKS, 64, 40)[0], 0) == ([1], [0])


def test_what_one_head_sees_counts_for_all_of_a_tile() -> None:
    def seen(q_pos, kv_pos, head, params):
        return (kv_pos >= q_pos - 1) | ((head == 3) & (kv_pos == 70) & (q_pos == 300))

    found, _ = tiles_of(AttentionVariant("seen", mask_mod=seen), 280, 40)
    assert listed(found, 0) == ([1, 4], [])


def test_a_prefix_that_sees_ahead_is_walked_to_its_end() -> None:
    found, table = tiles_of(PREFIX_LM, 0, 150, 140)
    first = table[:, 1].tolist().index(0)
    assert listed(found, first) == ([2], [0, 1])


def test_prefill_reads_nothing_of_what_is_hidden_whole() -> None:
    """Of 256 keys the tile sees the first block whole, and of the last its own; NaN lies between.
    What decode leaves out test_variants.py shows."""
    spec = PrefillSpec("hidden", 2, 1, 64, PAGE, ((240, 16),), 0, 0)
    case = make_case(BLOCKS.bind({"num_global": 64}), spec=spec, dtype="bfloat16")
    problem = case.problem
    kv = problem.kv.at[problem.block_tables[0, 2:6]].set(jnp.nan)
    tiles = make_prefill_tiles(
        problem.query_start_loc, problem.seq_lens, problem.num_decode_rows, spec.tokens, CONFIG
    )
    got = paged_prefill_sm90(
        problem.q,
        kv,
        problem.block_tables,
        tiles,
        jnp.zeros_like(problem.q),
        config=CONFIG,
        interpret=plgpu.InterpretGPUParams(),
        **case.rest,
    )
    assert largest_error(got, reference(case)) <= 4e-3
