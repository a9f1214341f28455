"""``use_beam_search``: what it looks for, and which fields cannot go with it."""

from collections.abc import Mapping
from typing import Any

from jaxllm.sampling_params import MAX_BEAM_WIDTH
from server.openai.fields import conflict, either, off

# A beam search goes by the model's own probabilities, and knows its answers at its end. These
# fields would change them, or ask for something on the way; here are the values that do not.
_NEUTRAL: dict[str, tuple[float | bool, ...]] = {
    "stream": (False,),
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "echo": (False,),
    "logit_bias": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "stop": (),
    "stop_token_ids": (),
    "prompt_logprobs": (),
    "response_format": (),
    "taps": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "thinking_token_budget": (),
}


def _with_beams() -> dict[str, Any]:
    fields: dict[str, Any] = {name: {"enum": [*some, None]} for name, some in _NEUTRAL.items()}
    widths = {"anyOf": [{"type": "null"}, {"maximum": MAX_BEAM_WIDTH}]}
    fields |= {"n": widths, "best_of": widths}
    fields["max_tokens"] = {"anyOf": [{"type": "null"}, {"minimum": 1}]}
    return {"properties": fields}


SCHEMA = either(off("use_beam_search"), _with_beams())


def check(width: int, fields: Mapping[str, Any]) -> None:
    """``fields``: all of a request's that asks for a beam search. Raises for those that cannot go
    with it.
    """
    if width > MAX_BEAM_WIDTH:
        name = "n" if fields["best_of"] is None else "best_of"
        raise conflict(name, f"a beam search is at most {MAX_BEAM_WIDTH} wide")
    if fields.get("max_tokens") == 0:
        raise conflict("max_tokens", "a beam search generates at least one token")
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and value not in neutral:
            raise conflict(name, "it cannot go with use_beam_search")
