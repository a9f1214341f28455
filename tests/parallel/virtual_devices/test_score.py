"""logprob_fn on several devices: every variant is its paper, gradients are those of one device."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.score import LogprobFn, ScoreParams, logprob_fn, save_attention
from pallas_kernels.attention.variants import VARIANTS
from tests.conftest import tiny_hf_config, write_tiny_tokenizer
from tests.fakes import dense_model
from tests.fakes.variant_requests import HEADS, VALUES, changes_of

TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 256, 40), jnp.int32)
# What requests would bring, as defaults.
AS_BROUGHT: dict[str, Any] = {
    "request_bias": {"bias": 1.5, "span": [7, 30]},
    "document_mask": {"starts": [20, 33, *[2**31 - 1] * 6]},
}
LEARNED = (
    {"layer": "differential", "variant": "t5_bias", "params": VALUES["t5_bias"]},
    {"layer": "forgetting", "variant": "sinks", "params": VALUES["sinks"]},
)


def described(directory: Path, layers: list[Any], **config: Any) -> dict[str, Any]:
    """A model and its layers, on file; arguments of ``logprob_fn``."""
    write_tiny_tokenizer(directory)
    sizes = {"num_hidden_layers": len(layers), "num_key_value_heads": HEADS}
    hf = tiny_hf_config("llama") | sizes | config
    (directory / "config.json").write_text(json.dumps(hf))
    (directory / "layers.json").write_text(json.dumps({"layers": layers}))
    attention = str(directory / "layers.json")
    return {"model": str(directory), "attention": attention, "load_format": "dummy"}


def test_every_variant_is_its_paper_on_four_devices(tmp_path: Path) -> None:
    """With a vocabulary that does not come out even."""
    names = tuple(VARIANTS)
    values = {name: VALUES.get(name, {}) | AS_BROUGHT.get(name, {}) for name in names}
    layers = [{"variant": name, "params": values[name]} for name in names]
    settings = described(tmp_path, layers, vocab_size=318)
    one, four = (logprob_fn(**settings, tensor_parallel_size=count) for count in (1, 4))
    brought = {name: value for each in AS_BROUGHT.values() for name, value in each.items()}
    weights, tokens = one.model.flatten(one.params.weights), TOKENS.tolist()
    changes = changes_of(names, brought)
    paper = dense_model.logprobs(one.model, weights, tokens, changes=changes)
    want = paper[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(jax.jit(four)(four.params, TOKENS), want, atol=1e-5)


def test_gradients_are_those_of_one_device(tmp_path: Path) -> None:
    """Of a bias by head and distance, of weights that are cut in several pieces, of all others."""
    settings = described(tmp_path, list(LEARNED), attention_bias=True, tie_word_embeddings=True)
    one, two = (logprob_fn(**settings, tensor_parallel_size=count) for count in (1, 2))

    def loss(fn: LogprobFn, params: ScoreParams) -> jax.Array:
        return -fn(params, TOKENS).mean()

    (cost, want), (its, got) = (
        jax.jit(jax.value_and_grad(lambda params, fn=fn: loss(fn, params)))(fn.params)
        for fn in (one, two)
    )
    assert float(cost) == pytest.approx(float(its), abs=1e-5)
    fused = two.model.fused
    assert {len(pieces) for pieces in fused.values()} == {2, 3, 6}
    for name, pieces in fused.items():
        ends = np.cumsum(np.repeat(pieces, 2))[:-1]
        halves = np.split(np.asarray(want.weights[name]), ends)
        want.weights[name] = jnp.asarray(np.concatenate(halves[::2] + halves[1::2]))
    for wanted, found in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        largest = float(jnp.abs(wanted).max())
        assert largest > 0
        np.testing.assert_allclose(found, wanted, atol=1e-4 * largest)
    save_attention(two, two.params, tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())["layers"]
    np.testing.assert_allclose(saved[0]["params"]["bias"], VALUES["t5_bias"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(saved[1]["params"]["sink"], VALUES["sinks"]["sink"])


def test_too_few_devices_are_told(tmp_path: Path) -> None:
    settings = described(tmp_path, ["causal"], num_attention_heads=16, num_key_value_heads=16)
    with pytest.raises(ConfigError, match=f"16, but this process sees {jax.device_count()} device"):
        logprob_fn(**settings, tensor_parallel_size=16)
