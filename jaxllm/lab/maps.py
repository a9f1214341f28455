"""Attention probabilities of a real model over a prompt, as an engine reads them by its taps."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxllm.errors import ConfigError
from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class AttentionMaps:
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    probs: Float[np.ndarray, "L H N N"]  # of layer, head, query, key


def attention_maps(
    model: str, prompt: str, layers: tuple[int, ...], **settings: Any
) -> AttentionMaps:
    """``layers`` from 0; below zero they count from the last. ``settings`` are the engine's.

    Raises:
        ConfigError: the engine does not start with them, or there is no such layer.
        InvalidRequestError: the prompt is empty, or too long to be read at once.
    """
    small = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "swap_space": 0.0}
    with LLM(model, taps=True, **small | settings) as llm:
        count = llm.plan.model.num_layers
        if not all(-count <= layer < count for layer in layers):
            raise ConfigError(f"--maps: this model's layers are 0 to {count - 1}.")
        chosen = tuple(dict.fromkeys(layer % count for layer in layers))
        names = [f"attn_probs.{layer}" for layer in chosen]
        wish = SamplingParams(max_tokens=0, taps=names, tap_positions="all")
        (output,) = llm.generate(prompt, wish, use_tqdm=False)
        decode = llm.get_tokenizer().decode
        tokens = [decode([token], skip_special_tokens=False) for token in output.prompt_token_ids]
    taps = output.outputs[0].taps or {}
    probs = np.stack([taps[name].values.swapaxes(0, 1) for name in names])
    return AttentionMaps(tuple(tokens), chosen, probs)
