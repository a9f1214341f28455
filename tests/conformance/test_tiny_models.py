"""Every architecture against transformers, on tiny random checkpoints that transformers made."""

from pathlib import Path

import numpy as np
import pytest

from jaxllm.models import MODELS, get_model
from jaxllm.models.params import model_def
from jaxllm.weights.loader import load_params
from jaxllm.weights.safetensors import SafetensorsSource
from scripts.parity import TINY
from tests.conformance import recording
from tests.conformance.paged_forward import PagedForward

pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-4  # float32; these models agree to about 5e-6

FP8_TOLERANCE = 0.5  # of logits up to 4


def paged_forward(checkpoint: Path, pages: str = "float32") -> PagedForward:
    source = SafetensorsSource(checkpoint)
    model_class = get_model(source.config["architectures"][0])
    model = model_def(model_class.config_from_hf(source.config), "float32")
    spec = dict(zip(model.names, model.specs, strict=True))
    rules = model_class.weight_rules(model.config)
    params = load_params(spec, rules, source, ignore=model_class.ignored_weights)
    return PagedForward(model, model.flatten(params), dtype=pages)


def test_every_architecture_has_a_tiny_model() -> None:
    assert {architecture for architecture, _ in TINY.values()} == set(MODELS.names())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_an_fp8_cache_stays_near_transformers(tiny_checkpoints: Path, name: str) -> None:
    """And is the same however the prompt is cut: what is attended is always what was stored."""
    forward = paged_forward(tiny_checkpoints / name, "float8_e4m3fn")
    for reference in recording.load(tiny_checkpoints / name / "reference.npz"):
        chunked = forward.logits(reference.token_ids, chunk=16)
        assert TOLERANCE < reference.logits_error(chunked) < FP8_TOLERANCE
        np.testing.assert_allclose(forward.logits(reference.token_ids), chunked, atol=TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("name", TINY)
def test_agrees_with_transformers(tiny_checkpoints: Path, name: str) -> None:
    forward = paged_forward(tiny_checkpoints / name)
    for reference in recording.load(tiny_checkpoints / name / "reference.npz"):
        whole = forward.logits(reference.token_ids)
        chunked = forward.logits(reference.token_ids, chunk=16)
        single = forward.logits(reference.token_ids, chunk=1)
        assert reference.logits_error(whole) < TOLERANCE
        assert reference.logits_error(chunked) < TOLERANCE
        assert reference.logits_error(single) < TOLERANCE
        # The cache now holds the prompt: go on one token at a time, as the engine does.
        tokens = [int(np.argmax(single[-1]))]
        while len(tokens) < len(reference.greedy):
            tokens.append(int(np.argmax(forward.feed(tokens[-1:], pad_to=1)[-1])))
        assert reference.first_wrong(tokens) is None
