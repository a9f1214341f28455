"""Every attention layer of the second seam beside the plain one, whole: projections, what is
written and what is attended, as an engine's step calls it. 32 rows that decode at 4,096 tokens, and
the last 2,048 tokens of a prompt of 4,096.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.kv_cache import KVCache, by_layer, from_layers, kv_cache_spec
from jaxllm.attention.layers import ATTENTION_LAYERS, DEFAULT_LAYER, layer_class
from jaxllm.attention.metadata import AttentionMetadata, StepAttention
from jaxllm.attention.select import cache_head_dims, select_backend
from jaxllm.config.env import prepare_accelerator
from jaxllm.config.model import LatentConfig, ModelConfig, RopeConfig
from jaxllm.config.plan import BatchKind
from jaxllm.layers.rotary import rotary_table
from pallas_kernels.bench.operation import Timed
from scripts.bench.h200.part import Part, main

PAGE, LAYERS, ROUNDS = 64, 8, 5  # layers have pages and weights of their own, one after the other
SECONDS = 0.5  # of one layer in one round: plain XLA may take a hundred times what kernels do
LATENT = LatentConfig(q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
WHOLE = ModelConfig(
    "LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=LAYERS,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=RopeConfig(500_000.0, 128),
    norm_eps=1e-5,
    max_position_embeddings=131_072,
    latent=LATENT,
)
SMALL = replace(
    WHOLE,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=RopeConfig(10_000.0, 16),
    latent=replace(LATENT, kv_rank=32, rope_dim=16),
)


def measure(part: Part) -> dict[str, Any]:
    prepare_accelerator(0.85)
    model = SMALL if part.tiny else WHOLE
    steps = {"decode": (4, 128, 1), "prefill": (1, 128, 64)}
    if not part.tiny:
        steps = {"decode": (32, 4096, 1), "prefill": (1, 4096, 2048)}
    return {op: in_turns(model, *sizes, runs=1 if part.tiny else 10) for op, sizes in steps.items()}


def in_turns(model: ModelConfig, rows: int, context: int, new: int, runs: int) -> dict[str, Any]:
    """Microseconds of each layer, the backend, and the plain layer's time over it."""
    made = {name: prepared(model, name, rows, context, new) for name in ATTENTION_LAYERS.names()}
    with ThreadPoolExecutor() as pool:  # compiled side by side
        pool.map(lambda one: jax.block_until_ready(one[0].dispatch()), made.values())
    once = {name: timed.seconds(1) for name, (timed, _) in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(ROUNDS):
        for name, (timed, _) in made.items():
            affordable = int(SECONDS / (once[name] * timed.calls * timed.queued))
            times[name].append(timed.seconds(max(1, min(runs, affordable))))
            if turn == 0:
                print(f"{name}: {times[name][0] * 1e6:.0f} us, {made[name][1]}", flush=True)
    plain = times[DEFAULT_LAYER]
    return {
        name: {
            "us": statistics.median(own) * 1e6,
            "of_plain": statistics.median(p / t for p, t in zip(plain, own, strict=True)),
            "backend": made[name][1],
        }
        for name, own in times.items()
    }


def prepared(model: ModelConfig, name: str, rows: int, context: int, new: int) -> tuple[Timed, str]:
    model = replace(model, attention_layers=(name,) * model.num_layers)
    if name == "latent" and model.latent is not None:
        model = replace(model, rope=replace(model.rope, dim=model.latent.rope_dim))
    spec, device = AttentionSpec.of(model, 0), jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    where = (jax.default_backend(), capability, PAGE, "bfloat16", device.device_kind)
    backend, reason = select_backend((spec,), AttentionTarget(*where))
    width = context // PAGE
    shapes = kv_cache_spec(
        model, rows * width + 1, PAGE, "bfloat16", cache_head_dims(model, backend)
    )
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = [jax.random.key(seed) for seed in range(len(shapes))]
    caches = tuple(normal(k, s.shape, s.dtype) for k, s in zip(keys, shapes, strict=True))
    layer = layer_class(model, 0)(model, 0, dtype=jnp.dtype("bfloat16"))
    graph, state = nnx.split(layer)

    def weights(key: jax.Array) -> Any:
        return jax.tree.map(lambda w: 0.02 * normal(key, w.shape, w.dtype), state)

    states = [weights(key) for key in keys[: model.num_layers]]
    tokens = rows * new
    metadata = AttentionMetadata(
        positions=jnp.tile(jnp.arange(context - new, context, dtype=jnp.int32), rows),
        token_slots=jnp.repeat(jnp.arange(rows, dtype=jnp.int32), new),
        query_start_loc=jnp.arange(rows + 1, dtype=jnp.int32) * new,
        seq_lens=jnp.full(rows, context, jnp.int32),
        block_tables=jnp.asarray(_shuffled(rows, width)),
        num_decode_rows=jnp.int32(rows if new == 1 else 0),
    )
    kind = BatchKind.DECODE if new == 1 else BatchKind.MIXED

    def step(caches: KVCache, states: Any, x: jax.Array, metadata: Any) -> Any:
        attend = StepAttention.bind(backend, metadata, kind, (spec,), PAGE)
        table, written = rotary_table(model.rope, metadata.positions), []
        for pages, own in zip(by_layer(model, caches), states, strict=True):
            x, pages = nnx.merge(graph, own)(x, pages, table, attend)
            written.append(pages)
        return from_layers(written), x

    program = jax.jit(step, donate_argnums=0)
    x = normal(jax.random.key(0), (tokens, model.hidden_size), jnp.dtype("bfloat16"))
    held = [caches]

    def dispatch() -> jax.Array:
        held[0], answer = program(held[0], states, x, metadata)
        return answer

    return Timed(dispatch, model.num_layers), reason


def _shuffled(rows: int, width: int) -> np.ndarray:
    pages = np.random.default_rng(0).permutation(rows * width) + 1
    return pages.reshape(rows, width).astype(np.int32)


if __name__ == "__main__":
    main(measure)
