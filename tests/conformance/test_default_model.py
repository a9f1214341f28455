"""The default model against transformers: tokens, logits and greedy text of 20 real prompts.

Both sides compute in float32 with weights that were rounded to bfloat16: jaxllm loads its converted
checkpoint, the reference what export_hf makes of the same GGUF file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.models import get_model
from jaxllm.models.params import model_def
from jaxllm.tokenizer.tokenizer import Tokenizer
from jaxllm.weights.checkpoint import load_converted
from jaxllm.weights.default_model import default_model_dir
from scripts.parity import NUM_BEAM_TOKENS, PROMPTS
from tests.conformance import recording
from tests.conformance.conftest import made_once, run_parity
from tests.conformance.export_hf import export_default_model
from tests.conformance.paged_forward import PagedForward
from tests.conftest import DEFAULT_MODEL_SIZES

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "smollm2-135m.npz"
BEAMS = GOLDEN.with_name("smollm2-135m-beams.json")
TOLERANCE = 1e-3
FRESH = 5
LONGEST = 72  # tokens of a prompt: with all padded to it there is one program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_dir()


@pytest.fixture(scope="module")
def forward(model_dir: Path) -> PagedForward:
    config = json.loads((model_dir / "config.json").read_text())
    model_class = get_model(config["architectures"][0])
    model = model_def(model_class.config_from_hf(config), "float32")
    params = load_converted(model_dir, dict(zip(model.names, model.specs, strict=True)))
    return PagedForward(model, model.flatten(params), max_len=512, pad_to=LONGEST)


@pytest.fixture(scope="module")
def golden() -> list[recording.Reference]:
    return recording.load(GOLDEN)


@pytest.fixture(scope="module")
def fresh(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> list[recording.Reference]:
    """Of each fifth prompt the same made now, with the whole logits of every position."""

    def make(folder: Path) -> None:
        exported = export_default_model(folder)
        run_parity(reference, "golden", exported, folder / "reference.npz", "--whole", str(FRESH))

    return recording.load(made_once(tmp_path_factory, "smollm2", make) / "reference.npz")


def prompt_text(tokenizer: Tokenizer, prompt: dict[str, Any]) -> str:
    if "text" in prompt:
        return prompt["text"]
    return tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True)


def test_tokens_are_the_reference_s(model_dir: Path, golden: list[recording.Reference]) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    prompts = json.loads(PROMPTS.read_text())
    ours = [
        tokenizer.encode(prompt_text(tokenizer, prompt), add_special_tokens="text" in prompt)
        for prompt in prompts
    ]
    assert len(prompts) == 20
    assert ours == [reference.token_ids for reference in golden]


def test_logits_agree_with_golden_file(
    forward: PagedForward, golden: list[recording.Reference]
) -> None:
    errors = [ref.logits_error(forward.logits(ref.token_ids)) for ref in golden]
    assert max(errors) < TOLERANCE, errors


def test_chunked_prefill_agrees_too(
    forward: PagedForward, golden: list[recording.Reference]
) -> None:
    longest = max(golden, key=lambda ref: len(ref.token_ids))
    assert longest.logits_error(forward.logits(longest.token_ids, chunk=24)) < TOLERANCE


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**DEFAULT_MODEL_SIZES, enable_embeddings=True) as made:
        yield made


def test_engine_writes_the_reference_s_greedy_tokens(
    llm: LLM, golden: list[recording.Reference]
) -> None:
    """All 20 at once through continuous batching."""
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate([ref.token_ids for ref in golden], params, use_tqdm=False)
    wrong = {
        index: (position, reference.margins[position])
        for index, (reference, output) in enumerate(zip(golden, outputs, strict=True))
        if (position := reference.first_wrong(output.outputs[0].token_ids)) is not None
    }
    assert not wrong, "prompt: (token, the reference's margin there)"


@pytest.mark.parametrize("search", json.loads(BEAMS.read_text()), ids=range(5))
def test_beam_search_finds_what_transformers_finds(llm: LLM, search: dict[str, Any]) -> None:
    params = BeamSearchParams(
        beam_width=search["beam_width"],
        max_tokens=NUM_BEAM_TOKENS,
        length_penalty=search["length_penalty"],
    )
    (output,) = llm.beam_search([search["prompt"]], params)
    ours = [sequence.tokens[len(search["prompt"]) :] for sequence in output.sequences]
    assert ours == search["answers"]
    scores = [
        sequence.cum_logprob / len(answer) ** params.length_penalty
        for sequence, answer in zip(output.sequences, ours, strict=True)
    ]
    assert scores == pytest.approx(search["scores"], rel=1e-3)


@pytest.mark.parity
def test_every_logit_agrees_with_transformers(
    forward: PagedForward, fresh: list[recording.Reference]
) -> None:
    errors = [ref.logits_error(forward.logits(ref.token_ids)) for ref in fresh]
    assert all(len(ref.full) == len(ref.token_ids) for ref in fresh)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parity
def test_golden_file_is_what_the_reference_says(
    golden: list[recording.Reference], fresh: list[recording.Reference]
) -> None:
    for old, new in zip(golden[::FRESH], fresh, strict=True):
        assert old.token_ids == new.token_ids
        np.testing.assert_allclose(old.logsumexp, new.logsumexp, atol=1e-3)
        assert old.first_wrong(new.greedy) is None
