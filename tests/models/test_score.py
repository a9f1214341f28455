"""logprob_fn: what the engine says of a prompt, differentiable, with what variants learn."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.score import LogprobFn, ScoreParams, logprob_fn, save_attention
from tests.conformance.paged_forward import PagedForward
from tests.conftest import tiny_hf_config

MODEL = LlamaForCausalLM.config_from_hf(tiny_hf_config("llama"))
TOKENS = np.random.RandomState(0).randint(0, 256, 40).astype(np.int32)
DUMMY: dict[str, Any] = {"load_format": "dummy", "dtype": "float32"}


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers, two variants with values of their own, one of them with what requests bring."""
    numbers = np.random.RandomState(1)
    bias = numbers.randn(MODEL.num_heads, 129).tolist()
    kinds = (
        {"variant": "t5_bias", "params": {"bias": bias}},
        {"variant": "request_bias", "params": {"bias": 2.0, "span": [3, 9]}},
    )
    path = tmp_path_factory.mktemp("layers") / "layers.json"
    path.write_text(json.dumps({"layers": kinds}))
    return str(path)


@pytest.fixture(scope="module")
def fn(tiny_model_dir: Path, layers: str) -> LogprobFn:
    return logprob_fn(str(tiny_model_dir), attention=layers, **DUMMY)


def test_it_is_what_is_served(tiny_model_dir: Path, fn: LogprobFn) -> None:
    """By the model and the attention of the engine, through pages, in chunks."""
    flat = fn.model.flatten(fn.params.weights)
    logits = PagedForward(fn.model, flat).logits(TOKENS.tolist(), chunk=16)[:-1]
    want = jax.nn.log_softmax(jnp.asarray(logits))[np.arange(39), TOKENS[1:]]
    got = np.asarray(jax.jit(fn)(fn.params, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(got, want, atol=1e-5)
    plain = logprob_fn(str(tiny_model_dir), **DUMMY)
    assert np.abs(jax.jit(plain)(plain.params, TOKENS) - got).max() > 1e-4, "variants matter"
    with pytest.raises(ConfigError, match="no attention variant"):
        save_attention(plain, plain.params, tiny_model_dir / "none.json")


def test_it_has_gradients_and_what_was_learned_is_kept(
    tiny_model_dir: Path, fn: LogprobFn, tmp_path: Path
) -> None:
    loss = jax.jit(lambda params: -fn(params, jnp.asarray(TOKENS)).mean())
    grads = jax.jit(jax.grad(loss))(fn.params)
    assert {*grads.attention[0], *grads.attention[1]} == {"bias"}
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    length = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads)) ** 0.5

    def moved(step: float) -> ScoreParams:
        return jax.tree.map(lambda p, g: p + jnp.float32(step / length) * g, fn.params, grads)

    change = float(loss(moved(0.005)) - loss(moved(-0.005))) / 0.01
    assert change == pytest.approx(length, rel=0.02)

    attention = moved(-30.0).attention
    save_attention(fn, fn.params._replace(attention=attention), tmp_path / "learned.json")
    again = logprob_fn(str(tiny_model_dir), attention=str(tmp_path / "learned.json"), **DUMMY)
    jax.tree.map(np.testing.assert_array_equal, again.params.attention, attention)
    assert float(loss(again.params)) < float(loss(fn.params))
