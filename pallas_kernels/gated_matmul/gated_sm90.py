"""``act(x @ gate.T) * (x @ up.T)`` in one launch for Hopper (sm_90a), in Pallas Mosaic GPU.

A persistent grid of thread blocks walks the tiles of the output in an order that keeps both
operands in the L2 cache. In a thread block one warpgroup fetches and two multiply, 64 tokens each,
holding a tile of the gate's product and the same tile of the other's: the activation is taken in
registers, and only its product with the other goes to memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gated_matmul.activations import ACTIVATIONS

ROWS = 64  # tokens of one consumer: the M of a wgmma instruction
_CONSUMERS = 2
_SHARED_BYTES = 232_448 - 1024  # per thread block, less what barriers take
_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class GatedConfig:
    """Changes no bits but by ``tile_k``, which the order of a sum does not depend on either."""

    tile_n: int = 128  # columns of the output
    tile_k: int = 64  # of the sum, in one pipeline step
    stages: int = 4  # steps in flight
    band: int = 8  # tiles along the tokens that are walked together
    cluster: int = 1  # 2: thread blocks in pairs fetch their common weights once
    lag: int = 0  # steps whose products may still run when the next are issued
    num_sms: int = 132

    def __post_init__(self) -> None:
        if self.tile_n not in (64, 128):
            raise ValueError(f"tile_n must be 64 or 128, not {self.tile_n}")
        if self.tile_k != 64:
            raise ValueError(f"tile_k must be 64, not {self.tile_k}")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster must be 1 or 2, not {self.cluster}")
        if not 0 <= self.lag < self.stages:
            raise ValueError(f"lag must be from 0 to {self.stages - 1}, not {self.lag}")
        if self.smem_bytes > _SHARED_BYTES:
            raise ValueError(f"{self} needs more shared memory than a thread block has")

    @property
    def tile_m(self) -> int:
        """Tokens of a thread block."""
        return _CONSUMERS * ROWS

    @property
    def smem_bytes(self) -> int:
        step = (self.tile_m + 2 * self.tile_n) * self.tile_k
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
    if platform != "sm_90":
        return f"the gated product is built for sm_90, not {platform}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"the gated product takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if activation not in ACTIVATIONS:
        return f"the gated product takes {', '.join(ACTIVATIONS)}, not {activation}"
    tile = config.tile_m * config.cluster
    if tokens % tile:
        return f"the gated product takes a multiple of {tile} tokens, not {tokens}"
    if inner % config.tile_n or width % config.tile_k:
        return (
            f"the gated product takes multiples of {config.tile_k} in and {config.tile_n} out, "
            f"not {width} and {inner}"
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
        grid=(config.num_sms // config.cluster,),
        grid_names=("pair",),
        cluster=(config.cluster,),
        cluster_names=("half",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, weight)


def _body(x: Any, weight: Any, out: Any, *, activation: str, config: GatedConfig) -> None:
    (tokens, width), inner = x.shape, out.shape[1]
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    consumer, half = lax.axis_index("wg"), lax.axis_index("half")
    rows = pl.ds(consumer * ROWS, ROWS)

    def pipeline(body: Any, context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(width // tile_k,),
            memory_registers=40,
            in_specs=[
                _stage((tile_m, tile_k), config),
                *(_stage((tile_n, tile_k), config, shared=True) for _ in range(2)),
            ],
            wg_axis="wg",
            num_compute_wgs=_CONSUMERS,
            max_concurrent_steps=config.stages,
            compute_context=context,
        )

    def multiply(_: Any, x: Any, gate: Any, up: Any, sums: Any) -> Any:
        for weights, accumulated in zip((gate, up), sums, strict=True):
            plgpu.wgmma(accumulated, x.at[rows], weights.transpose((1, 0)))
        plgpu.wgmma_wait(config.lag)
        return sums

    def none(*_: Any, **__: Any) -> None: ...

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(none, none).get_allocations(x, weight, weight),
        staging=plgpu.SMEM((_CONSUMERS, ROWS, tile_n), out.dtype, transforms=_swizzled()),
        collective_axes="wg",
    )
    def _(allocations: Any, staging: Any) -> None:
        bands = (tokens // tile_m // config.cluster, inner // tile_n)

        @plgpu.nd_loop((bands[0] * bands[1],), collective_axes="pair")
        def _(loop: Any) -> None:
            row, column = plgpu.planar_snake(loop.index[0], bands, 0, config.band)
            token = (row * config.cluster + half) * tile_m
            start = column * tile_n

            def context(run: Any) -> None:
                def summed(gate: Any, up: Any) -> None:
                    run((gate, up))
                    answer = ACTIVATIONS[activation](gate[...]) * up[...]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
                    staging[consumer] = answer.astype(out.dtype)
                    plgpu.commit_smem()
                    target = out.at[pl.ds(token + consumer * ROWS, ROWS), pl.ds(start, tile_n)]
                    plgpu.copy_smem_to_gmem(staging.at[consumer], target)

                sums = _Accumulator((ROWS, tile_n), jnp.float32)
                pl.run_scoped(summed, sums, sums)

            pipeline(multiply, context)(
                x.at[pl.ds(token, tile_m)],
                weight.at[pl.ds(start, tile_n)],
                weight.at[pl.ds(inner + start, tile_n)],
                allocations=allocations,
            )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _stage(shape: tuple[int, int], config: GatedConfig, *, shared: bool = False) -> Any:
    return plgpu.BlockSpec(
        shape,
        lambda step: (0, step),
        transforms=_swizzled(),
        memory_space=plgpu.SMEM,
        delay_release=config.lag,
        collective_axes=("half",) if shared and config.cluster > 1 else (),
    )


def _swizzled() -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # its base class is abstract to a type checker only
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, 64)), swizzle(128)
