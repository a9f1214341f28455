"""Random schemas through an LLM with random weights, many at once; what came of them."""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.grammar.convert import to_llguidance
from jaxllm.grammar.ll_tokenizer import load_ll_tokenizer
from tests.grammar.schemas import follows, some_document, unsupported_document

SETTINGS = {
    "load_format": "dummy",
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # few programs, soon compiled
}
MAX_TOKENS = 400


@dataclass
class Tally:
    """``wrong``: schemas with answers that ended and do not follow them. ``surprises``: supported
    schemas that were refused, unsupported ones that were not, requests that failed.
    """

    ends: Counter[str] = field(default_factory=Counter)  # by finish_reason
    num_refused: int = 0
    num_tokens: int = 0
    wrong: list[Any] = field(default_factory=list)
    surprises: list[Any] = field(default_factory=list)

    @property
    def share_finished(self) -> float:
        return self.ends["stop"] / max(sum(self.ends.values()), 1)


def open_llm(model_dir: Path) -> LLM:
    return LLM(str(model_dir), **SETTINGS)


def allowed_of(llm: LLM, spec: StructuredOutputsParams, text: str) -> str:
    """How much of ``text`` may be answered; with "$" behind it if the answer may end there."""
    info = llm.info
    tokenizer = load_ll_tokenizer(info.tokenizer_dir, info.vocab_size, info.eos_token_ids)
    matcher = LLMatcher(tokenizer, to_llguidance(spec, tokenizer))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    allowed = ids[: matcher.validate_tokens(ids)]
    matcher.consume_tokens(allowed)
    return tokenizer.decode_str(allowed) + "$" * matcher.is_accepting()


def run_round(llm: LLM, seed: int, count: int, tally: Tally) -> None:
    """``count`` answers at temperature 1, and a quarter as many schemas that must be refused."""
    rng = random.Random(seed)
    for _ in range(count // 4):
        schema = unsupported_document(rng)
        try:
            llm.generate("x", params_for(schema, rng), use_tqdm=False)
            tally.surprises.append({"accepted": schema})
        except InvalidRequestError:
            tally.num_refused += 1
    schemas = [some_document(rng) for _ in range(count)]
    prompts = ["".join(rng.choices("abc {}[]", k=rng.randrange(1, 20))) for _ in schemas]
    params = [params_for(schema, rng) for schema in schemas]
    for schema, output in zip(schemas, llm.generate(prompts, params, use_tqdm=False), strict=True):
        (answer,) = output.outputs
        tally.ends[str(answer.finish_reason)] += 1
        tally.num_tokens += len(answer.token_ids)
        if answer.finish_reason not in ("stop", "length"):
            tally.surprises.append({"schema": schema, "error": output.error})
        if answer.finish_reason == "stop" and not _follows(schema, answer.text):
            tally.wrong.append({"schema": schema, "answer": answer.text})


def _follows(schema: dict[str, Any], text: str) -> bool:
    try:
        return follows(schema, text)
    except ValueError:  # it is not even JSON
        return False


def params_for(schema: dict[str, Any], rng: random.Random) -> SamplingParams:
    structured = StructuredOutputsParams(json=schema, disable_any_whitespace=rng.random() < 0.3)
    return SamplingParams(
        temperature=1.0,
        seed=rng.getrandbits(32),
        max_tokens=MAX_TOKENS,
        presence_penalty=rng.choice((0.0, 0.0, 1.0)),
        structured_outputs=structured,
    )
