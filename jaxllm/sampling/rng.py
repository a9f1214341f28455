"""Seeds of requests. The noise itself is pallas_kernels.sampling.noise: a function of (seed,
position, token) and of nothing else, so that a request draws the same tokens whatever shares its
batch, wherever it sits in it, and after a preemption.
"""


def seed_words(seed: int) -> tuple[int, int]:
    """The 64 bits of a request's seed as two int32 values, for the row state."""
    bits = seed & (2**64 - 1)

    def signed(word: int) -> int:
        return word - 2**32 if word >= 2**31 else word

    return signed(bits >> 32), signed(bits & 0xFFFFFFFF)
