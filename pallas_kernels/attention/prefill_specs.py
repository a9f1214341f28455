"""The shapes of chunked prefill that tests, benchmarks and tuning share."""

from dataclasses import dataclass

from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variants.softcap import SOFTCAP
from pallas_kernels.head_dims import padded_dim
from pallas_kernels.kv_write.narrow import FP8


@dataclass(frozen=True)
class PrefillSpec:
    """Rows are (tokens already in the cache, tokens of this step); decode rows come first."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    page: int
    rows: tuple[tuple[int, int], ...]
    decode_rows: int = 0
    padding: int = 0  # tokens after the last row
    window: int | None = None
    softcap: float | None = None
    pages: str | None = None  # dtype of the cache; None: that of the queries
    value_dim: int | None = None  # of latents: the pages' keys are values too, so many channels

    @property
    def stored(self) -> int:
        """Channels of a head in the pages."""
        return self.dim if self.value_dim else padded_dim(self.dim)

    @property
    def parts(self) -> int:
        """Of a page: keys and values, or latents."""
        return 1 if self.value_dim else 2

    @property
    def variant(self) -> AttentionVariant:
        return CAUSAL if self.softcap is None else SOFTCAP.bind({"cap": self.softcap})

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.rows) + self.padding

    @property
    def flops(self) -> int:
        """Multiply-adds of unmasked pairs, times two, for scores and values together."""
        pairs = 0
        for cached, new in self.rows[self.decode_rows :]:
            for position in range(cached, cached + new):
                pairs += position + 1 if self.window is None else min(position + 1, self.window)
        return 2 * pairs * self.heads * (self.dim + (self.value_dim or self.dim))


# Small enough for the interpreter: each has a trap of its own.
SMALL = (
    PrefillSpec("one row from scratch", 2, 1, 128, 64, ((0, 64),)),
    PrefillSpec("unaligned rows", 2, 1, 64, 64, ((150, 1), (61, 70), (0, 33)), 1, 24),
    PrefillSpec("window", 2, 1, 64, 32, ((210, 1), (300, 45)), 1, 2, window=70),
    PrefillSpec("window of one", 2, 2, 64, 16, ((5, 60),), 0, 4, window=1),
    PrefillSpec("odd group", 3, 1, 64, 128, ((3, 130), (40, 7)), 0, 0),
    PrefillSpec("softcap", 4, 2, 128, 16, ((100, 30),), 0, 2, softcap=2.0),
    PrefillSpec("only padding and decode", 2, 1, 64, 64, ((9, 1), (3, 1)), 2, 62),
    PrefillSpec("fp8, unaligned", 2, 1, 64, 64, ((150, 1), (61, 70), (0, 33)), 1, 24, pages=FP8),
    PrefillSpec("fp8, window, padded heads", 3, 1, 96, 32, ((300, 45),), window=70, pages=FP8),
    PrefillSpec("wide heads, steps of half a page", 1, 1, 256, 128, ((60, 40),)),
    PrefillSpec("padded heads", 1, 1, 96, 64, ((0, 40),)),
)

# Correctness on the card: mixed batches with every edge at once.
MIXED = (
    PrefillSpec(
        "llama mix", 32, 8, 128, 64, ((900, 1), (64, 1), (1000, 333), (0, 517), (63, 65)), 2, 107
    ),
    PrefillSpec("llama window", 32, 8, 128, 64, ((2000, 700), (0, 324)), window=500),
    PrefillSpec("gemma cap", 16, 8, 128, 16, ((700, 257), (5, 250)), 0, 5, softcap=30.0),
    PrefillSpec("smol", 9, 3, 64, 64, ((10, 1), (100, 500), (0, 391)), 1, 132),
    PrefillSpec("qwen small", 14, 2, 64, 32, ((0, 1000), (77, 25)), 0, 0),
    PrefillSpec("wide pages", 32, 8, 128, 128, ((0, 640), (4000, 384))),
    PrefillSpec(
        "llama mix, fp8",
        32,
        8,
        128,
        64,
        ((900, 1), (64, 1), (1000, 333), (0, 517), (63, 65)),
        2,
        107,
        pages=FP8,
    ),
    PrefillSpec(
        "llama window, fp8", 32, 8, 128, 64, ((2000, 700), (0, 324)), window=500, pages=FP8
    ),
    PrefillSpec(
        "gemma, fp8", 16, 8, 128, 16, ((700, 257), (5, 250)), 0, 5, softcap=30.0, pages=FP8
    ),
    PrefillSpec("smol, fp8", 9, 3, 64, 64, ((10, 1), (100, 500), (0, 391)), 1, 132, pages=FP8),
    PrefillSpec("heads of 256", 16, 8, 256, 64, ((900, 1), (1000, 333), (0, 517)), 1, 20),
    PrefillSpec("heads of 256, gemma window", 8, 1, 256, 16, ((700, 257),), window=512),
    PrefillSpec("heads of 256, pages of 128", 4, 4, 256, 128, ((700, 257), (5, 250)), 0, 5),
    PrefillSpec("heads of 96", 32, 32, 96, 16, ((900, 1), (100, 333)), 1, 7),
)

# Speed: 32 query and 8 KV heads of 128, pages of 64.
SPEED = (
    PrefillSpec("8192 from scratch", 32, 8, 128, 64, ((0, 8192),)),
    PrefillSpec("2048 from scratch", 32, 8, 128, 64, ((0, 2048),)),
    PrefillSpec("2048 at 30k", 32, 8, 128, 64, ((30000, 2048),)),
    PrefillSpec("8 x 1024", 32, 8, 128, 64, ((0, 1024),) * 8),
    PrefillSpec("8192 from scratch, fp8", 32, 8, 128, 64, ((0, 8192),), pages=FP8),
    PrefillSpec("2048 at 30k, fp8", 32, 8, 128, 64, ((30000, 2048),), pages=FP8),
    PrefillSpec("8 x 1024, fp8", 32, 8, 128, 64, ((0, 1024),) * 8, pages=FP8),
)

SPEED_SMALL_PAGES = (
    PrefillSpec("8192, pages of 16", 32, 8, 128, 16, ((0, 8192),)),
    PrefillSpec("8192, pages of 32", 32, 8, 128, 32, ((0, 8192),)),
)

# Speed of other pages and head dims.
SPEED_OTHERS = (
    *SPEED_SMALL_PAGES,
    PrefillSpec("8192, heads of 96", 32, 32, 96, 64, ((0, 8192),)),
    PrefillSpec("8192, heads of 256", 16, 8, 256, 64, ((0, 8192),)),
    PrefillSpec("2048, heads of 256 by 16", 16, 8, 256, 16, ((0, 2048),)),
    PrefillSpec("2048, heads of 256 by 128", 16, 8, 256, 128, ((0, 2048),)),
)

# Latents, small enough for the interpreter.
LATENT_SMALL = (
    PrefillSpec("latents", 16, 1, 192, 16, ((9, 1), (61, 5), (0, 3)), 1, 1, value_dim=128),
    PrefillSpec("latents, wide pages", 24, 1, 128, 128, ((70, 3),), value_dim=128),
)

# With the heads of DeepSeek-V2-Lite and of V3: correctness on the card, speed.
LATENT_MIXED = tuple(
    PrefillSpec(
        f"latents, {heads} heads",
        heads,
        1,
        576,
        64,
        ((900, 1), (64, 1), (1000, 333), (0, 517), (63, 65)),
        2,
        107,
        value_dim=512,
    )
    for heads in (16, 128)
)
SPEED_LATENTS = (
    PrefillSpec("8192 from scratch, 16 heads", 16, 1, 576, 64, ((0, 8192),), value_dim=512),
    PrefillSpec("2048 at 30k, 16 heads", 16, 1, 576, 64, ((30000, 2048),), value_dim=512),
    PrefillSpec("8 x 1024, 16 heads", 16, 1, 576, 64, ((0, 1024),) * 8, value_dim=512),
    PrefillSpec("2048 from scratch, 128 heads", 128, 1, 576, 64, ((0, 2048),), value_dim=512),
)
