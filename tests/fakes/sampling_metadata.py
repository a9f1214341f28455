"""SamplingMetadata for tests of the sampler alone."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.metadata import SamplingMetadata


def metadata(rows: int, **values: np.ndarray) -> SamplingMetadata:
    """Neutral parameters for ``rows`` rows, with the named ones replaced."""
    zeros, ones = jnp.zeros((rows,), jnp.float32), jnp.ones((rows,), jnp.float32)
    counts = jnp.zeros((rows,), jnp.int32)
    neutral = SamplingMetadata(
        temperature=zeros,
        top_k=counts,
        top_p=ones,
        min_p=zeros,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=ones,
        seed=jnp.zeros((rows, 2), jnp.int32),
        position=counts,
        stop_ban_end=counts,
        num_stop_ids=counts,
        stop_ids=jnp.zeros((rows, 4), jnp.int32),
        num_bias=counts,
        bias_ids=jnp.zeros((rows, 4), jnp.int32),
        bias_values=jnp.zeros((rows, 4), jnp.float32),
    )
    return replace(neutral, **{name: jnp.asarray(value) for name, value in values.items()})
