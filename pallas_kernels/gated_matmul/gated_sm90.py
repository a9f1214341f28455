"""``act(x @ gate.T) * (x @ up.T)`` in one launch for Hopper (sm_90a), in Pallas Mosaic GPU.

A persistent grid of thread blocks walks the tiles of the output in an order that keeps both
operands in the L2 cache. In a thread block one warpgroup fetches and two multiply, 64 tokens each,
holding a tile of the gate's product and the same tile of the other's: the activation is taken in
registers, and only its product with the other goes to memory.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gated_matmul.activations import ACTIVATIONS
from pallas_kernels.hopper import refuses_hopper

ROWS = 64  # tokens of one consumer: the M of a wgmma instruction
_CONSUMERS = 2
_TILE_K = 64  # of the sum, in one pipeline step: the width of a swizzled tile
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40
_SHARED_BYTES = 232_448 - 1024  # per thread block, less what barriers take
# Measured beside the vendor's product and XLA's activation (scripts/tune_kernels.py has the grid):
# 128 tokens take as long, 256 are 8 % faster, 512 8 % slower, 1,024 and more 4 to 7 % faster.
_LEAST_TOKENS = 256
_LEAST_BUSY = 0.9  # share of the thread blocks with a tile, over all rounds
_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class GatedConfig:
    """Changes no bits."""

    tile_n: int = 128  # columns of the output
    stages: int = 4  # steps in flight
    band: int = 16  # tiles along the tokens that are walked together
    num_ctas: int = 132  # persistent thread blocks: the number of SMs

    def __post_init__(self) -> None:
        if self.tile_n not in (64, 128):
            raise ValueError(f"tile_n must be 64 or 128, not {self.tile_n}")
        if self.stages < 2 or self.band < 1 or self.num_ctas < 1:
            raise ValueError(f"{self} has fewer than 2 stages, no band or no thread block")
        if self.smem_bytes > _SHARED_BYTES:
            raise ValueError(f"{self} needs more shared memory than a thread block has")

    @property
    def tile_m(self) -> int:
        """Tokens of a thread block."""
        return _CONSUMERS * ROWS

    @property
    def smem_bytes(self) -> int:
        step = (self.tile_m + 2 * self.tile_n) * _TILE_K
        return 2 * (self.stages * step + self.tile_m * self.tile_n)


def refuses_gated_sm90(
    tokens: int,
    width: int,
    inner: int,
    dtype: Any,
    activation: str,
    platform: str,
    config: GatedConfig | None = None,
) -> str | None:
    """None if the kernel takes the product, else the reason."""
    config = config or GatedConfig()
    if (reason := refuses_hopper("the gated product", dtype, platform)) is not None:
        return reason
    if activation not in ACTIVATIONS:
        return f"the gated product takes {', '.join(ACTIVATIONS)}, not {activation}"
    if tokens % config.tile_m or tokens < _LEAST_TOKENS:
        least = f"{_LEAST_TOKENS} tokens or more in steps of {config.tile_m}"
        return f"the gated product takes {least}, not {tokens}"
    if inner % config.tile_n or width % _TILE_K:
        return (
            f"the gated product takes multiples of {_TILE_K} in and {config.tile_n} out, "
            f"not {width} and {inner}"
        )
    rounds = tokens // config.tile_m * (inner // config.tile_n) / config.num_ctas
    if tokens > _LEAST_TOKENS and rounds / math.ceil(rounds) < _LEAST_BUSY:
        return (
            f"{tokens} tokens leave too many thread blocks idle in the last of {rounds:.1f} rounds"
        )
    return None


@functools.partial(jax.jit, static_argnames=("activation", "config", "interpret"))
def gated_matmul_sm90(
    x: Float[Array, "T E"],
    weight: Float[Array, "N2 E"],
    *,
    activation: str,
    config: GatedConfig | None = None,
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See ``api.py``. Sums, activation and product are float32; rounded once."""
    config = config or GatedConfig()
    (tokens, _), inner = x.shape, weight.shape[0] // 2
    return plgpu.kernel(
        functools.partial(_body, activation=activation, config=config),
        out_type=jax.ShapeDtypeStruct((tokens, inner), x.dtype),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        scratch_types=_scratch(x.dtype, config),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, weight)


class _Shared(NamedTuple):
    """Shared memory of a thread block, then its barriers, one per stage."""

    x: Any  # [stages, tile_m, _TILE_K]
    weight: Any  # [stages, 2 tile_n, _TILE_K]: gate's rows, then up's
    answers: Any  # [consumers, ROWS, tile_n]
    full: Any
    free: Any


def _scratch(dtype: Any, config: GatedConfig) -> dict[str, Any]:
    tiling: Any = plgpu.TilingTransform  # its base class is abstract to a type checker only
    swizzle: Any = plgpu.SwizzleTransform
    swizzled = (tiling((8, 64)), swizzle(128))

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    return {
        "x": tile(config.stages, config.tile_m, _TILE_K),
        "weight": tile(config.stages, 2 * config.tile_n, _TILE_K),
        "answers": tile(_CONSUMERS, ROWS, config.tile_n),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=config.stages),
        "free": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=config.stages),
    }


def share(total: int, cta: Array, num_ctas: int) -> Array:
    """How many of ``total`` tiles a thread block has: none, where there are more of these. One that
    multiplied a tile outside of the product ended the program (illegal instruction), but not in the
    interpreter.
    """
    return lax.div(jnp.int32(total + num_ctas - 1) - cta, jnp.int32(num_ctas))


class _Walk:
    """The tiles of this thread block, and the steps of each."""

    def __init__(self, x: Any, out: Any, config: GatedConfig):
        self.config = config
        self._tiles = (x.shape[0] // config.tile_m, out.shape[1] // config.tile_n)
        self.steps = x.shape[1] // _TILE_K  # of a tile
        self._cta, total = lax.axis_index("cta"), self._tiles[0] * self._tiles[1]
        self.count = share(total, self._cta, config.num_ctas)

    def place(self, turn: Array) -> tuple[Array, Array]:
        """First token and first column of a tile."""
        index = turn * self.config.num_ctas + self._cta
        row, column = plgpu.planar_snake(index, self._tiles, 0, self.config.band)
        return row * self.config.tile_m, column * self.config.tile_n

    def stage(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.config.stages))


def _body(*refs: Any, activation: str, config: GatedConfig, **shared: Any) -> None:
    x, weight, out = refs
    walk, smem, warpgroup = _Walk(x, out, config), _Shared(**shared), lax.axis_index("wg")

    @pl.when(warpgroup == _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(walk, x, weight, smem)

    @pl.when(warpgroup != _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        _consume(walk, smem, out, warpgroup, ACTIVATIONS[activation])


def _produce(walk: _Walk, x: Any, weight: Any, smem: _Shared) -> None:
    config, inner = walk.config, weight.shape[0] // 2

    def fetch(token: Array, column: Array, index: Array, step: Array) -> None:
        stage, part = walk.stage(step), pl.ds(index * _TILE_K, _TILE_K)

        @pl.when(step >= config.stages)
        def _() -> None:
            plgpu.barrier_wait(smem.free.at[stage])

        full = smem.full.at[stage]
        plgpu.copy_gmem_to_smem(x.at[pl.ds(token, config.tile_m), part], smem.x.at[stage], full)
        for i in range(2):
            rows = weight.at[pl.ds(i * inner + column, config.tile_n), part]
            half = smem.weight.at[stage, pl.ds(i * config.tile_n, config.tile_n)]
            plgpu.copy_gmem_to_smem(rows, half, full)

    @pl.loop(0, walk.count)
    def _(turn: Array) -> None:
        token, column = walk.place(turn)

        @pl.loop(0, walk.steps)
        def _(index: Array) -> None:
            fetch(token, column, index, turn * walk.steps + index)

    done = walk.count * walk.steps

    @pl.loop(lax.max(done - config.stages, jnp.int32(0)), done)
    def _(step: Array) -> None:  # a thread block may not end with arrivals under way
        plgpu.barrier_wait(smem.free.at[walk.stage(step)])


def _consume(
    walk: _Walk, smem: _Shared, out: Any, consumer: Array, activation: Callable[[Array], Array]
) -> None:
    config, rows = walk.config, pl.ds(consumer * ROWS, ROWS)

    @pl.loop(0, walk.count)
    def _(turn: Array) -> None:
        token, column = walk.place(turn)
        begin = turn * walk.steps

        def multiply(sums: Any) -> Array:
            @pl.loop(0, walk.steps)
            def _(index: Array) -> None:
                stage = walk.stage(begin + index)
                plgpu.barrier_wait(smem.full.at[stage])
                both = smem.weight.at[stage].transpose((1, 0))  # reads x once for the two
                plgpu.wgmma(sums, smem.x.at[stage, rows], both)
                plgpu.wgmma_wait(0)  # the other consumer's products fill the gap
                plgpu.barrier_arrive(smem.free.at[stage])

            return sums[...]

        shape = (ROWS, 2 * config.tile_n)
        sums = pl.run_scoped(multiply, _Accumulator(shape, jnp.float32))
        answer = activation(sums[:, : config.tile_n]) * sums[:, config.tile_n :]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        smem.answers[consumer] = answer.astype(smem.answers.dtype)
        plgpu.commit_smem()
        target = out.at[pl.ds(token + consumer * ROWS, ROWS), pl.ds(column, config.tile_n)]
        plgpu.copy_smem_to_gmem(smem.answers.at[consumer], target)

    plgpu.wait_smem_to_gmem(0)
