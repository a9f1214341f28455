"""The shapes of decode attention that tests, benchmarks and tuning share."""

from dataclasses import dataclass

from pallas_kernels.attention.decode_config import head_groups
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variants.softcap import SOFTCAP
from pallas_kernels.head_dims import padded_dim
from pallas_kernels.kv_write.narrow import FP8


@dataclass(frozen=True)
class DecodeSpec:
    """One query per row; a length of 0 is a padding row."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    page: int
    lens: tuple[int, ...]
    window: int | None = None
    softcap: float | None = None
    max_pages: int | None = None  # width of the block tables; None: the longest row
    pages: str = "bfloat16"  # dtype of the cache
    value_dim: int | None = None  # of latents: the pages' keys are values too, so many channels

    @property
    def stored(self) -> int:
        """Channels of a head in the pages."""
        return self.dim if self.value_dim else padded_dim(self.dim)

    @property
    def groups(self) -> int:
        return head_groups(self.heads, self.kv_heads, self.value_dim)

    @property
    def parts(self) -> int:
        """Of a page: keys and values, or latents."""
        return 1 if self.value_dim else 2

    @property
    def variant(self) -> AttentionVariant:
        return CAUSAL if self.softcap is None else SOFTCAP.bind({"cap": self.softcap})

    @property
    def width(self) -> int:
        return self.max_pages or max(1, -(-max(self.lens) // self.page))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values the queries see."""
        seen = sum(n if self.window is None else min(n, self.window) for n in self.lens)
        return seen * self.parts * self.kv_heads * self.dim * (2 if self.pages == "bfloat16" else 1)


# Small enough for the interpreter with splits of 128 tokens, chunks of 256: each has its own trap.
SMALL = (
    DecodeSpec("one full page", 4, 1, 128, 64, (64,)),
    DecodeSpec("several splits, padding", 8, 2, 128, 64, (300, 0, 1)),
    DecodeSpec("odd heads", 9, 3, 64, 64, (140,)),
    DecodeSpec("window inside a page", 4, 2, 64, 64, (330,), window=100),
    DecodeSpec("window across splits, small pages", 4, 1, 128, 16, (290, 5), window=150),
    DecodeSpec("window of one", 2, 1, 64, 32, (129,), window=1),
    DecodeSpec("softcap", 4, 1, 128, 32, (100,), softcap=2.0),
    DecodeSpec("wide group, wide pages", 12, 1, 64, 128, (200,)),
    DecodeSpec("tables wider than any row", 2, 2, 128, 64, (65,), max_pages=9),
    DecodeSpec("fp8, several splits, padded heads", 8, 2, 96, 64, (300, 0, 1), pages=FP8),
    DecodeSpec("fp8, window, wide group, small pages", 9, 1, 64, 16, (290,), window=150, pages=FP8),
    DecodeSpec("wide heads, stages of half a page", 4, 1, 256, 128, (200,), window=90),
    DecodeSpec("padded heads", 2, 1, 80, 64, (70, 0)),
    DecodeSpec("latents", 16, 1, 320, 64, (200, 77), value_dim=256),
    DecodeSpec("latents, two groups", 40, 1, 192, 32, (300, 0, 1), window=290, value_dim=128),
)

# Correctness on the card: every edge at once, with the default splits.
_MIXED = (1, 0, 63, 64, 65, 255, 256, 257, 900, 2047, 2048, 2049, 4096, 9000, 0, 17)
MIXED = (
    DecodeSpec("llama mix", 32, 8, 128, 64, _MIXED),
    DecodeSpec("llama mix, wide tables", 32, 8, 128, 64, _MIXED, max_pages=2048),
    DecodeSpec("llama window", 32, 8, 128, 64, _MIXED, window=4096),
    DecodeSpec("gemma window and cap", 16, 8, 128, 16, _MIXED, window=1000, softcap=30.0),
    DecodeSpec("smol", 9, 3, 64, 64, _MIXED),
    DecodeSpec("qwen small", 14, 2, 64, 32, _MIXED),
    DecodeSpec("one KV head each", 16, 16, 128, 128, _MIXED),
    DecodeSpec("glm", 32, 2, 128, 64, _MIXED),
    DecodeSpec("one KV head for all", 32, 1, 128, 64, _MIXED),
    DecodeSpec("heads of 256", 16, 8, 256, 64, _MIXED),
    DecodeSpec("heads of 256, gemma window", 8, 1, 256, 16, _MIXED, window=512, softcap=50.0),
    DecodeSpec("DeepSeek-V2-Lite", 16, 1, 576, 64, _MIXED, value_dim=512),
    DecodeSpec("DeepSeek-V3", 128, 1, 576, 64, _MIXED, value_dim=512),
    DecodeSpec("gemma, fp8", 16, 8, 128, 16, _MIXED, window=1000, softcap=30.0, pages=FP8),
    DecodeSpec("one KV head for all, wide pages, fp8", 32, 1, 128, 128, _MIXED, pages=FP8),
    DecodeSpec("llama mix, fp8", 32, 8, 128, 64, _MIXED, pages=FP8),
    DecodeSpec("smol, fp8", 9, 3, 64, 64, _MIXED, pages=FP8),
    DecodeSpec("heads of 256, pages of 128", 16, 16, 256, 128, _MIXED),
    DecodeSpec("heads of 80", 32, 8, 80, 64, _MIXED),
)


def _llama(
    name: str, lens: tuple[int, ...], max_pages: int | None = None, pages: str = "bfloat16"
) -> DecodeSpec:
    return DecodeSpec(name, 32, 8, 128, 64, lens, max_pages=max_pages, pages=pages)


_UNEVEN = tuple(200 + (i * 2731) % 7800 for i in range(64))

# Speed: 32 query and 8 KV heads of 128, pages of 64.
SPEED = (
    _llama("B32 x 4096", (4096,) * 32),
    _llama("B8 x 8192", (8192,) * 8),
    _llama("B64 x 1024", (1024,) * 64),
    _llama("B1 x 65536", (65536,)),
    _llama("B256 x 1024", (1024,) * 256),
    _llama("B64 x 1024, tables of 8192", (1024,) * 64, max_pages=128),
    _llama("B64 x 200-8000", _UNEVEN),
    _llama("B8 x 1024", (1024,) * 8),
    _llama("B1 x 1024", (1024,)),
    _llama("B32 x 4096, fp8", (4096,) * 32, pages=FP8),
    _llama("B64 x 1024, fp8", (1024,) * 64, pages=FP8),
    _llama("B1 x 65536, fp8", (65536,), pages=FP8),
    _llama("B256 x 1024, fp8", (1024,) * 256, pages=FP8),
)

# Speed of other pages and head dims, beside the same work in the shape above.
SPEED_OTHERS = (
    DecodeSpec("B64 x 1024, pages of 16", 32, 8, 128, 16, (1024,) * 64),
    DecodeSpec("B64 x 1024, pages of 32", 32, 8, 128, 32, (1024,) * 64),
    DecodeSpec("B32 x 4096, pages of 16", 32, 8, 128, 16, (4096,) * 32),
    DecodeSpec("B8 x 1024, pages of 16", 32, 8, 128, 16, (1024,) * 8),
    DecodeSpec("B64 x 1024, heads of 80", 32, 8, 80, 64, (1024,) * 64),
    DecodeSpec("B64 x 1024, heads of 256", 16, 8, 256, 64, (1024,) * 64),
    DecodeSpec("B32 x 4096, heads of 256", 16, 8, 256, 64, (4096,) * 32),
    DecodeSpec("B64 x 1024, heads of 256 by 16", 16, 8, 256, 16, (1024,) * 64),
    DecodeSpec("B64 x 1024, heads of 256 by 128", 16, 8, 256, 128, (1024,) * 64),
)


def _deepseek(name: str, heads: int, lens: tuple[int, ...]) -> DecodeSpec:
    return DecodeSpec(name, heads, 1, 576, 64, lens, value_dim=512)


# Latents, with the heads of DeepSeek-V2-Lite and of V3, whole and shared by four GPUs.
SPEED_LATENTS = (
    _deepseek("B128 x 4096, 16 heads", 16, (4096,) * 128),
    _deepseek("B32 x 4096, 16 heads", 16, (4096,) * 32),
    _deepseek("B64 x 1024, 16 heads", 16, (1024,) * 64),
    _deepseek("B1 x 65536, 16 heads", 16, (65536,)),
    _deepseek("B32 x 4096, 32 heads", 32, (4096,) * 32),
    _deepseek("B32 x 4096, 128 heads", 128, (4096,) * 32),
)
