"""Learn an attention bias on a text, by the gradients of jaxllm.score, and serve it.

    scripts/learn_attention.py --text FILE... --out learned.json [--seconds 60]

The model's weights stay as they are; every head of every layer learns what to add to its scores by
distance (the variant t5_bias, from zero). The last tenth of the text is held out. At the end an
engine is started with the values that were written, and says of the held-out text what it says of
any prompt.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.score import LogprobFn, ScoreParams, logprob_fn, save_attention

VARIANT = "t5_bias"
MOST_HELD_OUT = 8  # sequences


def sequences(llm_model: str, paths: list[Path], length: int) -> np.ndarray:
    """The text as token ids, int32 [N, length]."""
    from jaxllm.tokenizer.tokenizer import Tokenizer
    from jaxllm.weights.resolve import resolve_model

    tokenizer = Tokenizer.from_dir(resolve_model(llm_model).tokenizer_dir)
    ids = tokenizer.encode("\n\n".join(path.read_text() for path in paths))
    count = len(ids) // length
    if count < 10:
        raise SystemExit(f"The text has {len(ids)} tokens: {10 * length} at least are needed.")
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def learned(
    fn: LogprobFn, texts: np.ndarray, seconds: float, rate: float
) -> Iterator[tuple[int, float, tuple[dict[str, jax.Array], ...]]]:
    """Adam on one sequence after the other: step, loss, and the values so far."""

    def loss(attention: tuple[dict[str, jax.Array], ...], tokens: jax.Array) -> jax.Array:
        return -fn(ScoreParams(fn.params.weights, attention), tokens).mean()

    @jax.jit
    def step(state, tokens: jax.Array, count: jax.Array):
        values, mean, square = state
        found, grads = jax.value_and_grad(loss)(values, tokens)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, grads)
        a, b = 1 - 0.9**count, 1 - 0.99**count
        values = jax.tree.map(
            lambda v, m, s: v - rate * (m / a) / (jnp.sqrt(s / b) + 1e-8), values, mean, square
        )
        return (values, mean, square), found

    zeros = jax.tree.map(jnp.zeros_like, fn.params.attention)
    state, order = (fn.params.attention, zeros, zeros), np.random.RandomState(0)
    end = None
    for count in range(1, 10_000):
        tokens = jnp.asarray(texts[order.randint(len(texts))])
        state, found = step(state, tokens, jnp.float32(count))
        yield count, float(found), state[0]
        end = end or time.monotonic() + seconds  # the first step compiles
        if time.monotonic() > end:
            return


def served(model: str, attention: str, texts: np.ndarray) -> float:
    """Mean log-probability of held-out tokens, by an engine."""
    wish = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with LLM(
        model,
        dtype="float32",
        attention=attention,
        max_model_len=texts.shape[1] + 1,
        max_num_seqs=2,
    ) as llm:
        outputs = llm.generate([text.tolist() for text in texts], wish)
    said = [
        position[token].logprob
        for text, output in zip(texts.tolist(), outputs, strict=True)
        for token, position in zip(text, output.prompt_logprobs or (), strict=True)
        if position is not None
    ]
    return float(np.mean(said))


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn an attention bias on a text and serve it.")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="file for --attention")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rate", type=float, default=0.02)
    args = parser.parse_args()

    texts = sequences(args.model, args.text, args.length)
    held = max(1, min(MOST_HELD_OUT, len(texts) // 10))
    texts, held_out = texts[:-held], texts[-held:]
    fn = logprob_fn(args.model, attention=VARIANT)
    values = fn.params.attention
    for count, loss, latest in learned(fn, texts, args.seconds, args.rate):
        values = latest
        if count & (count - 1) == 0:
            print(f"step {count}: loss {loss:.4f}", flush=True)
    save_attention(fn, ScoreParams(fn.params.weights, values), args.out)
    score = jax.jit(lambda attention, text: fn(ScoreParams(fn.params.weights, attention), text))
    for name, attention in (("as it was", fn.params.attention), ("learned", values)):
        loss = -np.mean([score(attention, jnp.asarray(text)) for text in held_out])
        print(f"held out, {name}: loss {loss:.4f}")
    print(f"held out, served:  loss {-served(args.model, str(args.out), held_out):.4f}")


if __name__ == "__main__":
    main()
