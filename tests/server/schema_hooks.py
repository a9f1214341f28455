# pyright: reportMissingImports=false
"""A check for schemathesis, which loads this file into its own environment: what the schema allows
is refused only for reasons that no schema can tell.
"""

import json
import re
from typing import Any

import schemathesis

REASONS = re.compile(
    "|".join(
        (
            "The prompt is empty",  # it is not where a tokenizer begins every text with a token
            "messages must not be empty",  # nothing but reasoning, which is not shown again
            "has no text that the chat template keeps",
            "holds token id",  # as many as the model has
            "this model takes at most",
            "but there is room for",
            "must not exceed max_tokens",
            "must not be less than n",  # of two fields, like the next four
            "the best are known at the end",
            "cannot go with structured_outputs",
            "it needs logprobs to be true",  # more alternatives than schemathesis can multiply
            "prompts times n",
            "This server's operator",
            "was not started for (embeddings|taps)",
            "this engine does not schedule by it",
            "Invalid 'interventions'",  # how often, and how large when multiplied
            "the base64 of float32",
            "it takes one prompt",
            "Invalid 'tool_choice': (a call is required|there is no tool)",
            "attention_params",  # of the engine's attention
            "does not know how the model marks its thoughts",
            # what is no JSON schema, or no grammar, and two that ask for two things
            "Invalid '(guided_[a-z]+|structured_outputs|response_format|[a-z_]+.format)':",
            "Invalid 'tools'",  # what a grammar of their calls cannot say
            "got a decimal number instead",  # 3.0 is an integer to a schema, but not to OpenAI
        )
    )
)


@schemathesis.check
def what_the_schema_allows_is_accepted(ctx: Any, response: Any, case: Any) -> None:
    made = case.meta.generation.mode if case.meta is not None else None
    if made is None or not made.is_positive or not 400 <= response.status_code < 500:
        return
    message = json.loads(response.content)["error"]["message"]
    assert REASONS.search(message), f"refused, though the schema allows it: {message}"
