"""A decoder in NumPy and float64, written from the papers: no cache, no chunks, no batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxllm.config.model import ModelConfig
from jaxllm.models.params import ModelDef, Params


class Seen(NamedTuple):
    """What softmax is taken of. ``visible`` broadcasts with scores: which query sees which key."""

    scores: np.ndarray  # [H, T, T]
    visible: np.ndarray
    sink: np.ndarray | float = -np.inf  # [H, 1, 1]: the logit of one more key, without a value


Change = Callable[[Seen], Seen]  # what an attention variant does


@dataclass
class Layer:
    """What one attention layer knows. ``visible`` [T, T]: which query sees which key, before
    ``change`` has its say."""

    config: ModelConfig
    index: int
    params: dict[str, np.ndarray]
    visible: np.ndarray
    change: Change = lambda seen: seen

    def product(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.params[f"{name}.weight"].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return rms(x, 1e-6) * self.params[f"{name}.weight"]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """x [T, H, D]: channel i turns with i + D / 2 (arXiv:2104.09864)."""
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * self.config.rope.theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def weights(
        self, q: np.ndarray, k: np.ndarray, dim: int, bias: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Softmax over keys, [H, T, T]; q and k [T, H, D]."""
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim) + bias
        scores, visible, sink = self.change(Seen(scores, self.visible))
        scores = np.where(visible, scores, -np.inf)
        largest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        exp = np.exp(scores - largest)
        return exp / (exp.sum(axis=-1, keepdims=True) + np.exp(sink - largest))

    def heads(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        parts = self.product(x, "qkv").reshape(len(x), -1, config.head_dim)
        q, k, v = np.split(parts, [config.num_heads, config.num_heads + config.num_kv_heads], 1)
        return q, k, v


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def grouped(layer: Layer, x: np.ndarray, *, turned: bool) -> np.ndarray:
    q, k, v = layer.heads(x)
    if turned:
        q, k = layer.rotate(q), layer.rotate(k)
    k, v = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
    out = np.einsum("hqk,khd->qhd", layer.weights(q, k, q.shape[-1]), v)
    return layer.product(out.reshape(len(x), -1), "o")


def differential(layer: Layer, x: np.ndarray) -> np.ndarray:
    """Two softmaxes per pair of heads, the second weighed by lambda (arXiv:2410.05258, eq. 1-3)."""
    q, k, v = layer.heads(x)
    q, k, p = layer.rotate(q), layer.rotate(k), layer.params
    groups, half, dim = q.shape[1] // k.shape[1], q.shape[1] // 2, q.shape[-1]
    k = np.repeat(k, groups, axis=1)
    v = np.concatenate(np.split(v, 2, axis=1), axis=-1).repeat(groups, axis=1)
    init = 0.8 - 0.6 * math.exp(-0.3 * layer.index)
    weight = math.exp(p["lambda_q1"] @ p["lambda_k1"]) - math.exp(p["lambda_q2"] @ p["lambda_k2"])
    weights = layer.weights(q, k, dim)
    weights = weights[:half] - (weight + init) * weights[half:]
    out = rms(np.einsum("hqk,khd->qhd", weights, v), layer.config.norm_eps) * (1 - init)
    return layer.product(out.reshape(len(x), -1), "o")


def forgetting(layer: Layer, x: np.ndarray) -> np.ndarray:
    """The product of the gates between key and query weighs a pair (arXiv:2503.02130, eq. 4-8)."""
    q, k, v = layer.heads(x)
    q, k = layer.rotate(q), layer.rotate(k)
    logs = -np.log1p(np.exp(-(layer.product(x, "gate") + layer.params["gate.bias"])))
    groups = q.shape[1] // k.shape[1]
    between = np.array(
        [
            [logs[key + 1 : query + 1].sum(axis=0) for key in range(len(x))]
            for query in range(len(x))
        ]
    )
    bias = np.repeat(between.transpose(2, 0, 1), groups, axis=0)
    k, v = (np.repeat(part, groups, axis=1) for part in (k, v))
    out = np.einsum("hqk,khd->qhd", layer.weights(q, k, q.shape[-1], bias), v)
    return layer.product(out.reshape(len(x), -1), "o")


def latent(layer: Layer, x: np.ndarray) -> np.ndarray:
    """Keys and values written out for every head (arXiv:2405.04434, section 2.1)."""
    sizes, count = layer.config.latent, len(x)
    assert sizes is not None and sizes.q_rank is not None
    made = layer.product(x, "kv_a")
    compressed = layer.norm(made[:, : sizes.kv_rank], "kv_a_norm")
    shared = layer.rotate(made[:, None, sizes.kv_rank :])
    of_heads = layer.product(compressed, "kv_b").reshape(count, layer.config.num_heads, -1)
    k, v = np.split(of_heads, [sizes.nope_dim], axis=-1)
    k = np.concatenate([k, np.repeat(shared, k.shape[1], axis=1)], axis=-1)
    q = layer.product(layer.norm(layer.product(x, "q_a"), "q_a_norm"), "q")
    plain, turned = np.split(q.reshape(count, k.shape[1], -1), [sizes.nope_dim], axis=-1)
    q = np.concatenate([plain, layer.rotate(turned)], axis=-1)
    out = np.einsum("hqk,khd->qhd", layer.weights(q, k, q.shape[-1]), v)
    return layer.product(out.reshape(count, -1), "o")


LAYERS: dict[str, Callable[[Layer, np.ndarray], np.ndarray]] = {
    "rotary": lambda layer, x: grouped(layer, x, turned=True),
    "nope": lambda layer, x: grouped(layer, x, turned=False),
    "differential": differential,
    "latent": latent,
    "forgetting": forgetting,
}


def logprobs(
    model: ModelDef,
    params: Params,
    tokens: list[int],
    span: int = 0,
    changes: Sequence[Change] = (),
) -> np.ndarray:
    """[T, V] of what follows each token; the first ``span`` tokens see each other. ``changes`` are
    the layers' variants, where they have any."""
    config, at = model.config, np.arange(len(tokens))
    named = {n: np.asarray(p, np.float64) for n, p in zip(model.names, params, strict=True)}
    x = named["embed.weight"][tokens]
    for index in range(config.num_layers):
        prefix = f"layers.{index}."
        mine = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
        visible = (at[None] <= at[:, None]) | (at[None] < span) & (at[:, None] < span)
        window = config.window(index)
        if window is not None:
            visible &= at[None] > at[:, None] - window
        own = {k.removeprefix("attention."): v for k, v in mine.items()}
        layer = Layer(config, index, own, visible, *changes[index : index + 1])
        normed = rms(x, config.norm_eps) * mine["input_norm.weight"]
        x = x + LAYERS[config.attention_layer(index) or "rotary"](layer, normed)
        normed = rms(x, config.norm_eps) * mine["mlp_norm.weight"]
        gate, up = np.split(normed @ mine["mlp.gate_up.weight"].T, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mine["mlp.down.weight"].T
    logits = rms(x, config.norm_eps) * named["norm.weight"] @ named["lm_head.weight"].T
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
