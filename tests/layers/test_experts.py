"""Mixtures of experts beside experts that are asked one by one, in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.model import ExpertsConfig
from jaxllm.layers.experts import Experts, expert_weights
from tests.fakes.tiny_engine import TINY

RNG = np.random.default_rng(3)
GREEDY = ExpertsConfig(0, count=8, chosen=3, size=6, shared_size=10, factor=1.5)
LIMITED = replace(GREEDY, groups=4, groups_chosen=2)
SIGMOID = replace(LIMITED, scoring="sigmoid", normalised=True)
KINDS = {"greedy": GREEDY, "limited to groups": LIMITED, "sigmoid": SIGMOID}
BIAS = RNG.normal(size=8).astype(np.float32)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def chosen_weights(logits: np.ndarray, experts: ExpertsConfig) -> dict[int, float]:
    """Of one token, by the papers' text."""
    if experts.scoring == "softmax":
        scores, bests = np.exp(logits) / np.exp(logits).sum(), 1
        merit = scores
    else:
        scores, bests = 1 / (1 + np.exp(-logits)), 2
        merit = scores + BIAS
    groups = np.split(np.arange(experts.count), experts.groups)
    groups.sort(key=lambda group: -np.sort(merit[group])[-bests:].sum())
    allowed = np.concatenate(groups[: experts.groups_chosen])
    chosen = sorted(allowed, key=lambda index: -merit[index])[: experts.chosen]
    total = scores[chosen].sum() if experts.normalised else 1.0
    return {int(index): float(scores[index] / total) * experts.factor for index in chosen}


@pytest.mark.parametrize("name", KINDS)
def test_a_token_takes_the_sum_of_its_experts(name: str) -> None:
    experts = KINDS[name]
    model = replace(TINY, experts=experts)
    layer = Experts(model, dtype=jnp.dtype("float32"), platform="cpu")
    inner, hidden = experts.inner_size, model.hidden_size
    router, gate_up, down = (
        RNG.normal(size=shape).astype(np.float32) * 0.3
        for shape in ((experts.count, hidden), (2 * inner, hidden), (hidden, inner))
    )
    layer.router.weight[...], layer.gate_up.weight[...], layer.down.weight[...] = map(
        jnp.asarray, (router, gate_up, down)
    )
    bias = None
    if layer.choice_bias is not None:
        layer.choice_bias[...] = bias = jnp.asarray(BIAS)
    x = RNG.normal(size=(20, hidden)).astype(np.float32)

    def block(token: np.ndarray, channels: slice) -> np.ndarray:
        gate, up = gate_up[:inner][channels], gate_up[inner:][channels]
        return down[:, channels] @ (silu(gate @ token) * (up @ token))

    shared = slice(experts.count * experts.size, None)
    wanted, met = [], set()
    for token in x.astype(np.float64):
        weights = chosen_weights(router @ token, experts)
        met |= set(weights)
        parts = (
            weight * block(token, slice(index * experts.size, (index + 1) * experts.size))
            for index, weight in weights.items()
        )
        wanted.append(sum(parts, start=block(token, shared)))
    assert len(met) > experts.chosen, "tokens differ in their experts"
    program = jax.jit(lambda x, logits: (layer(x), expert_weights(logits, bias, experts)))
    got, of_token = program(x, x @ router.T)
    np.testing.assert_allclose(got, np.stack(wanted), rtol=2e-4, atol=2e-4)
    assert ((np.asarray(of_token) > 0).sum(axis=1) == experts.chosen).all()


def test_an_expert_that_overflows_harms_no_token_that_does_not_take_it() -> None:
    model = replace(TINY, experts=GREEDY)
    layer = Experts(model, dtype=jnp.dtype("float16"), platform="cpu")
    count, inner, hidden = GREEDY.count, GREEDY.inner_size, model.hidden_size
    router = np.zeros((count, hidden), np.float16)
    router[0] = -1.0  # nobody takes the first expert
    gate_up = np.full((2 * inner, hidden), 0.01, np.float16)
    gate_up[: GREEDY.size] = gate_up[inner : inner + GREEDY.size] = 1000.0
    layer.router.weight[...], layer.gate_up.weight[...] = map(jnp.asarray, (router, gate_up))
    layer.down.weight[...] = jnp.full((hidden, inner), 0.01, jnp.float16)
    got = np.asarray(jax.jit(layer)(jnp.ones((2, hidden), jnp.float16)))
    assert np.isfinite(got).all() and (got > 0).all()
