"""Fused rope and KV write, to be timed and tuned: bytes read and written per second."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.bench.operation import Operation, Timed
from pallas_kernels.kv_write.kv_write_sm90 import (
    KVWriteConfig,
    refuses_kv_write_sm90,
    rope_and_write_sm90,
)
from pallas_kernels.kv_write.narrow import narrow, widened
from pallas_kernels.kv_write.reference import rope_and_write_reference
from pallas_kernels.kv_write.specs import SMALL, SPECS, SPEED, KVWriteBatch, KVWriteSpec
from pallas_kernels.kv_write.xla import rope_and_write_xla

_PAGES = 37  # of the check


class KVWriteInputs(NamedTuple):
    """All arguments of the operation but the cache; the norm weights last, if any."""

    qkv: jax.Array
    cos: jax.Array
    sin: jax.Array
    pages: jax.Array
    offsets: jax.Array
    norms: tuple[jax.Array, ...]

    def write(self, op: Callable[..., Any], kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        return op(*self[:5], kv, *self.norms)


class KVWriteOperation(Operation[KVWriteBatch, KVWriteConfig]):
    name, unit, speed, small = "kv_write", "byte", SPEED, SMALL

    def label(self, spec: KVWriteBatch) -> str:
        heads = f"{spec.spec.heads}/{spec.spec.kv_heads} heads of {spec.spec.dim}"
        pages = ", fp8 pages" if spec.spec.pages else ""
        return f"{spec.tokens} tokens, {heads}{', qk-norm' * spec.spec.qk_norm}{pages}"

    def amount(self, spec: KVWriteBatch) -> int:
        heads, written = spec.spec.heads + 2 * spec.spec.kv_heads, 2 * spec.spec.kv_heads
        saved = written if spec.spec.pages else 0
        return spec.tokens * (4 * heads - saved) * spec.spec.dim

    def default(self, spec: KVWriteBatch) -> KVWriteConfig:
        return KVWriteConfig()

    def grid(self, default: KVWriteConfig, num_sms: int) -> Sequence[dict[str, Any]]:
        return [{"vector": vector} for vector in dict.fromkeys((default.vector, 8, 4, 2))]

    def refuses(self, spec: KVWriteBatch, config: KVWriteConfig, platform: str) -> str | None:
        shape = spec.spec
        facts = (shape.heads, shape.kv_heads, shape.dim, "bfloat16")
        return refuses_kv_write_sm90(*facts, platform, pages=shape.pages)

    def timed(self, spec: KVWriteBatch, config: KVWriteConfig | None) -> Timed:
        layers, loops = 32 if spec.tokens <= 256 else 6, 20 if spec.tokens <= 256 else 5
        if jax.default_backend() == "cpu":
            layers, loops = 2, 2
        return Timed(
            kv_write_chain(_op(config, spec.spec.dim), spec, layers, loops), layers * loops
        )

    def checker(self) -> Callable[[KVWriteConfig], str | None]:
        def wrong(config: KVWriteConfig) -> str | None:
            found = (kv_write_error(_op(config, spec.dim), spec) for spec in SPECS)
            return next((error for error in found if error), None)

        return wrong


def kv_write_inputs(batch: KVWriteBatch, num_pages: int, seed: int = 0) -> KVWriteInputs:
    """Every token has a slot of its own, except that token 1 of three or more is padding."""
    spec, tokens = batch
    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    width = (spec.heads + 2 * spec.kv_heads) * spec.dim
    slots = rng.permutation((num_pages - 1) * spec.page)[:tokens] + spec.page  # never page 0
    page, offset = slots // spec.page, slots % spec.page
    if tokens > 2:
        page[1] = num_pages
    angle = jnp.asarray(rng.uniform(0, 1000, size=(tokens, spec.dim // 2)), jnp.float32)
    norms = [1 + 0.1 * jax.random.normal(key, (spec.dim,), jnp.bfloat16) for _ in "qk"]
    return KVWriteInputs(
        jax.random.normal(key, (tokens, width), jnp.bfloat16),
        jnp.cos(angle),
        jnp.sin(angle),
        jnp.asarray(page, jnp.int32),
        jnp.asarray(offset, jnp.int32),
        tuple(norms) if spec.qk_norm else (),
    )


def kv_write_cache(spec: KVWriteSpec, num_pages: int, seed: int = 1) -> jax.Array:
    shape = (num_pages, 2, spec.kv_heads, spec.page, spec.stored)
    kv = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return narrow(kv, spec.pages or kv.dtype)


def kv_write_error(op: Callable[..., Any], spec: KVWriteSpec) -> str | None:
    """What is wrong with 100 tokens written by ``op``; what no token owns must keep its bits."""
    inputs, kv = kv_write_inputs(KVWriteBatch(spec, 100), _PAGES), kv_write_cache(spec, _PAGES)
    want = inputs.write(partial(rope_and_write_reference, head_dim=spec.dim), kv)
    q, new = inputs.write(op, kv)
    pages, offsets = np.asarray(inputs.pages), np.asarray(inputs.offsets)
    own = pages < _PAGES
    kept = np.ones(kv.shape, bool)
    kept[pages[own], :, :, offsets[own]] = False
    if (np.asarray(new)[kept] != np.asarray(kv)[kept]).any():
        return f"{spec} changes what no token owns"
    written = widened(new, jnp.float32)
    errors = [_relative(got, right) for got, right in zip((q, written), want, strict=True)]
    limits = (1e-2, 4e-2 if spec.pages else 1e-2)  # the reference rounds nothing
    right = all(error < limit for error, limit in zip(errors, limits, strict=True))  # no NaN is
    return None if right else f"{spec}: queries and cache are {errors} off"


def kv_write_chain(
    op: Callable[..., Any], batch: KVWriteBatch, layers: int, loops: int
) -> Callable[[], jax.Array]:
    """A device-side loop over layers with caches and projections of their own."""
    spec, tokens = batch
    num_pages = max(256, 2 * tokens // spec.page)
    inputs = [kv_write_inputs(batch, num_pages, seed) for seed in range(layers)]
    caches = [tuple(kv_write_cache(spec, num_pages) for _ in range(layers))]

    def run(caches: Any, inputs: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            # Tied together, so that nothing is hoisted out of the loop.
            (caches, _q), fed = lax.optimization_barrier((carry, inputs))
            out = [one.write(op, kv) for one, kv in zip(fed, caches, strict=True)]
            return tuple(kv for _, kv in out), jnp.stack([q[-1] for q, _ in out])

        q = jnp.zeros((layers, spec.heads, spec.stored), jnp.bfloat16)
        return lax.fori_loop(0, loops, body, (caches, q))

    program = jax.jit(run, donate_argnums=0)

    def dispatch() -> jax.Array:
        caches[0], q = program(caches[0], inputs)
        return q

    return dispatch


def _op(config: KVWriteConfig | None, head_dim: int) -> Callable[..., Any]:
    if config is None:
        return partial(rope_and_write_xla, head_dim=head_dim)
    return lambda *args: rope_and_write_sm90(*args, config=config)


def _relative(got: jax.Array, want: jax.Array) -> float:
    difference = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel())
    return float(difference / jnp.linalg.norm(want.ravel()))
