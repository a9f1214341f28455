"""A Llama's forward pass over one whole sequence in NumPy, float64, with every activation kept and
what requests change done by hand. Shares no code with the engine.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.config.model import ModelConfig
from jaxllm.taps.interventions import AblateHead, Intervention, Patch, Steer


def plain_forward(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokens: Sequence[int],
    interventions: Sequence[Intervention] = (),
) -> dict[str, np.ndarray]:
    """Every tap by name, [N, ...]."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    count = len(tokens)
    ago = np.arange(count)[:, None] - np.arange(count)[None]
    taps: dict[str, np.ndarray] = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
        return x / rms * w[f"{name}.weight"]

    def reach(x: np.ndarray, number: int) -> np.ndarray:
        x = x.copy()
        for item in interventions:
            if isinstance(item, AblateHead) or item.layer != number:
                continue
            vector = np.frombuffer(item.vector, "<f4").astype(np.float64)  # pyright: ignore
            if isinstance(item, Patch):
                x[item.position] = vector
            elif isinstance(item, Steer):
                x[item.first : item.last + 1] += item.coefficient * vector
        taps[f"resid.{number}"] = x
        taps[f"logits.{number}"] = norm(x, "norm") @ w["lm_head.weight"].T
        return x

    x = w["embed.weight"][list(tokens)]
    for number in range(config.num_layers):
        name = f"layers.{number}"
        x = reach(x, number)
        qkv = norm(x, f"{name}.input_norm") @ w[f"{name}.attention.qkv.weight"].T
        q, k, v = np.split(qkv.reshape(count, -1, dim), [heads, heads + kv_heads], axis=1)
        q, k = (_rotated(part, config.rope.theta) for part in (q, k))
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->qhk", q, k) * dim**-0.5
        seen = (ago >= 0) & (ago < (config.window(number) or count))
        scores = np.where(seen[:, None], scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        taps[f"attn_probs.{number}"] = probs
        out = np.einsum("qhk,khd->qhd", probs, v)
        for item in interventions:
            if isinstance(item, AblateHead) and item.layer == number:
                out[:, item.head] = 0
        branch = out.reshape(count, -1) @ w[f"{name}.attention.o.weight"].T
        taps[f"attn_out.{number}"] = branch
        x = x + branch
        gate, up = np.split(norm(x, f"{name}.mlp_norm") @ w[f"{name}.mlp.gate_up.weight"].T, 2, 1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down.weight"].T
    reach(x, config.num_layers)
    return taps


def _rotated(x: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
