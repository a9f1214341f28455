"""Truncated sampling: the kernels where they take the shape, plain XLA elsewhere."""

from jaxtyping import Array, Float, Int

from pallas_kernels.sampling.sample_sm90 import Truncation, refuses_sample_sm90, sample_sm90
from pallas_kernels.sampling.xla import sample_xla


def sample(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
    seed: Int[Array, "R 2"],
    position: Int[Array, " R"],
    *,
    platform: str,
) -> Int[Array, " R"]:
    """One token per row of float32 logits, in [0, V).

    A row of temperature 0 gives its first largest logit. Else logits are divided by temperature,
    and what does not pass is left out: min-p keeps those within log(min_p) of the largest (0:
    all), top-k the k largest of these (0: all), top-p the fewest largest of those whose
    probabilities reach top_p (1: all). Ties with the least value kept are kept. The token is the
    argmax of what is kept plus Gumbel noise, a function of the row's seed (two words of a threefry
    key), position, and token id alone, so a row's token does not depend on the other rows.
    ``platform`` is ``"sm_90"`` for Hopper; every other value takes XLA. Only the program for
    ``"cpu"`` branches at run time: on a GPU the host would have to read the conditions.
    """
    truncation = Truncation(temperature, top_k, top_p, min_p)
    if refuses_sample_sm90(logits.shape[1], platform) is None:
        return sample_sm90(logits, truncation, seed, position)
    if platform == "cpu":
        return sample_xla(logits, *truncation, seed, position, bits=1, skip=True)
    return sample_xla(logits, *truncation, seed, position)
