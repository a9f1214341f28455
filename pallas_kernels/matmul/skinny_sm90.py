"""Few rows times a weight that is streamed once (Hopper, Pallas Mosaic GPU).

The operands are swapped: out^T = W x^T, so that weight rows are the 64-wide side of the wgmma and
the rows of x the narrow one. One warpgroup feeds a ring of weight and x blocks by TMA, as deep as
shared memory allows, because bytes in flight decide the bandwidth; the others multiply. Where the
weight has too few rows to fill the device, K is split among the CTAs of a cluster, which send
their sums to each other's shared memory and add them in order: no partial sum leaves the chip.

How K is split depends on the weight alone and columns of a wgmma never mix, so the bits of a row
do not depend on how many rows there are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.matmul.skinny_config import (
    TILE,
    SkinnyConfig,
    default_skinny_config,
    padded_rows,
)

_WGMMA, _TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]

Ref = Any  # a GMEM, SMEM or barrier reference inside a kernel


class _Op(NamedTuple):
    n: int
    k: int
    columns: int  # rows of x, padded
    dtype: Any
    out_dtype: Any
    gated: bool
    config: SkinnyConfig

    @property
    def stages(self) -> int:
        return self.config.stages(self.columns, jnp.dtype(self.out_dtype).itemsize)

    @property
    def steps(self) -> int:
        """Blocks of K of one CTA and item."""
        return self.k // (self.config.splits * self.config.block_k)

    @property
    def items(self) -> int:
        return -(-self.n // self.config.rows)

    @property
    def grid(self) -> int:
        return self.items if self.config.splits > 1 else min(self.items, self.config.num_ctas)

    def count(self) -> Array:
        """Items of this CTA."""
        rounds, rest = divmod(self.items, self.grid)
        return jnp.int32(rounds) + (lax.axis_index("cta") < rest).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("gated", "out_dtype", "config", "interpret"))
def skinny_matmul_sm90(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    gated: bool = False,
    out_dtype: Any = None,
    config: SkinnyConfig | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """See ``api.py``. Jitted so that the layers of a model lower and compile it once."""
    (rows, k), n = x.shape, w.shape[0]
    config = config or default_skinny_config(n, k, gated=gated)
    op = _Op(n, k, padded_rows(rows), x.dtype, jnp.dtype(out_dtype or x.dtype), gated, config)
    cluster = {"cluster": (config.splits,), "cluster_names": ("split",)}
    return plgpu.kernel(
        functools.partial(_body, op),
        out_type=jax.ShapeDtypeStruct((rows, n // 2 if gated else n), op.out_dtype),
        grid=(op.grid,),
        grid_names=("cta",),
        **(cluster if config.splits > 1 else {}),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(op),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, w)


def _scratch(op: _Op) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    config, stages = op.config, op.stages
    owned = config.owned(op.columns)

    def smem(dtype: Any, *sizes: int) -> Any:
        itemsize = jnp.dtype(dtype).itemsize
        swizzle = min(128, sizes[-1] * itemsize)
        return plgpu.SMEM(
            sizes,
            dtype,
            transforms=(
                plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
                plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
            ),
        )

    scratch = {
        "w": smem(op.dtype, stages, config.rows, config.block_k),
        "x": smem(op.dtype, stages, op.columns, config.block_k),
        "staging": smem(op.out_dtype, config.consumers, owned, TILE),
        "full": plgpu.Barrier(num_arrivals=3 if op.gated else 2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=config.consumers, num_barriers=stages),
    }
    if config.splits > 1:
        sums = (config.consumers, config.tiles, config.splits, TILE, owned)
        scratch["sums"] = smem(jnp.float32, *sums)
        arrivals = config.tiles * config.splits
        scratch["summed"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.consumers)
    return scratch


def _body(op: _Op, *refs: Ref, **smem: Ref) -> None:
    x, w, out = refs
    warpgroup = lax.axis_index("warpgroup")
    consumers = op.config.consumers
    if op.config.prefetch:
        plgpu.griddepcontrol_launch_dependents()

    @pl.when(warpgroup == consumers)
    def _() -> None:
        _produce(op, x, w, smem)

    @pl.when(warpgroup < consumers)
    def _() -> None:
        _consume(op, warpgroup, out, smem)


def _split(op: _Op) -> Array:
    return lax.axis_index("split") if op.config.splits > 1 else jnp.int32(0)


def _produce(op: _Op, x: Ref, w: Ref, smem: dict[str, Ref]) -> None:
    config, stages = op.config, op.stages
    first = _split(op) * op.steps
    total = op.count() * op.steps
    filled = lax.min(total, jnp.int32(stages))
    # Copies drop or zero what lies past the end of an array. A start that is not a constant
    # escapes JAX's check.
    zero = lax.axis_index("cta") * 0

    def channels(step: Array) -> Any:
        block = lax.rem(step, jnp.int32(op.steps))
        return pl.ds((first + block) * config.block_k, config.block_k)

    def copy_weight(step: Array, stage: Array) -> None:
        item = lax.div(step, jnp.int32(op.steps)) * op.grid + lax.axis_index("cta")
        parts = 2 if op.gated else 1
        rows = config.rows // parts
        for part in range(parts):
            source = w.at[pl.ds(item * rows + part * (op.n // 2), rows), channels(step)]
            target = smem["w"].at[stage, pl.ds(part * rows, rows)]
            plgpu.copy_gmem_to_smem(source, target, smem["full"].at[stage])

    def copy_x(step: Array, stage: Array) -> None:
        source = x.at[pl.ds(zero, op.columns), channels(step)]
        plgpu.copy_gmem_to_smem(source, smem["x"].at[stage], smem["full"].at[stage])

    @pl.loop(0, filled)
    def _(step: Array) -> None:
        copy_weight(step, step)

    if config.prefetch:
        plgpu.griddepcontrol_wait()

    @pl.loop(0, filled)
    def _(step: Array) -> None:
        copy_x(step, step)

    @pl.loop(filled, total)
    def _(step: Array) -> None:
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(smem["free"].at[stage])
        copy_weight(step, stage)
        copy_x(step, stage)

    # Every arrival must have been waited for before the barriers go away.
    @pl.loop(0, filled)
    def _(stage: Array) -> None:
        plgpu.barrier_wait(smem["free"].at[stage])


def _consume(op: _Op, consumer: Array, out: Ref, smem: dict[str, Ref]) -> None:
    accumulator = _Accumulator((TILE, op.columns), jnp.float32)

    @pl.loop(0, op.count())
    def _(turn: Array) -> None:
        item = turn * op.grid + lax.axis_index("cta")
        multiply = functools.partial(_multiply, op, consumer, turn * op.steps, smem)
        sums = pl.run_scoped(multiply, *[accumulator] * op.config.tiles)
        if op.config.splits > 1:
            _exchange(op, consumer, item, sums, out, smem)
        elif op.gated:
            # Half of the tiles are gate rows, the others their up rows.
            half = op.config.tiles // 2
            for tile, (gate, up) in enumerate(zip(sums[:half], sums[half:], strict=True)):
                gate, up = (part.astype(op.dtype).astype(jnp.float32) for part in (gate, up))
                gate = (gate / (1.0 + jnp.exp(-gate))).astype(op.dtype).astype(jnp.float32)
                row = item * (op.config.rows // 2) + _place(op, consumer, tile)
                _store(op, consumer, gate * up, row, 0, out, smem)
        else:
            for tile, value in enumerate(sums):
                row = item * op.config.rows + _place(op, consumer, tile)
                _store(op, consumer, value, row, 0, out, smem)

    plgpu.wait_smem_to_gmem(0)


def _place(op: _Op, consumer: Array, tile: int) -> Array:
    """The first row of a consumer's tile, among those of the CTA."""
    return (tile * op.config.consumers + consumer) * TILE


def _multiply(
    op: _Op, consumer: Array, start: Array, smem: dict[str, Ref], *sums: Ref
) -> list[Array]:
    stages = jnp.int32(op.stages)

    @pl.loop(0, op.steps)
    def _(block: Array) -> None:
        stage = lax.rem(start + block, stages)
        plgpu.barrier_wait(smem["full"].at[stage])
        x = smem["x"].at[stage].transpose((1, 0))
        for tile, total in enumerate(sums):
            rows = pl.ds(_place(op, consumer, tile), TILE)
            plgpu.wgmma(total, smem["w"].at[stage, rows], x)

        # While these run, the block before is no longer read.
        plgpu.wgmma_wait(len(sums))

        @pl.when(block > 0)
        def _() -> None:
            plgpu.barrier_arrive(smem["free"].at[lax.rem(start + block - 1, stages)])

    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem["free"].at[lax.rem(start + op.steps - 1, stages)])
    return [total[...] for total in sums]


def _exchange(
    op: _Op, consumer: Array, item: Array, sums: list[Array], out: Ref, smem: dict[str, Ref]
) -> None:
    """Every CTA of the cluster adds up some columns, in the order of the splits."""
    config, split = op.config, _split(op)
    owned = config.owned(op.columns)
    summed = smem["summed"].at[consumer]
    for tile, value in enumerate(sums):
        for owner in range(op.columns // owned):
            plgpu.async_store_smem(
                value[:, owner * owned : (owner + 1) * owned],
                smem["sums"].at[consumer, tile, split],
                summed,
                cluster_idx=jnp.int32(owner),
                cluster_dim="split",
            )

    @pl.when(split < op.columns // owned)
    def _() -> None:
        plgpu.barrier_wait(summed)
        for tile in range(config.tiles):
            received = smem["sums"].at[consumer, tile]
            total = plgpu.load(received.at[0], layout=_WGMMA)
            for other in range(1, config.splits):
                total = total + plgpu.load(received.at[other], layout=_WGMMA)
            row = item * config.rows + _place(op, consumer, tile)
            _store(op, consumer, total, row, split * owned, out, smem)


def _store(
    op: _Op, consumer: Array, value: Array, row: Array, column: Array | int, out: Ref, smem: Any
) -> None:
    """Transposes a tile on its way to ``out``, which may end within it."""
    staging = smem["staging"].at[consumer]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy before has read the staging buffer
    narrow = value.astype(op.out_dtype)
    staging.transpose((1, 0))[...] = plgpu.layout_cast(narrow, _TRANSPOSED)
    plgpu.commit_smem()
    columns = pl.ds(lax.axis_index("cta") * 0 + column, staging.shape[0])
    plgpu.copy_smem_to_gmem(staging, out.at[columns, pl.ds(row, TILE)])
