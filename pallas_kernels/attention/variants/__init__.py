"""The variants there are, by name. Each is one file and one line here. See README.md."""

from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variants.alibi import ALIBI
from pallas_kernels.attention.variants.block_global import BLOCK_GLOBAL
from pallas_kernels.attention.variants.dilated import DILATED
from pallas_kernels.attention.variants.document_mask import DOCUMENT_MASK
from pallas_kernels.attention.variants.forgetting import FORGETTING
from pallas_kernels.attention.variants.head_windows import HEAD_WINDOWS
from pallas_kernels.attention.variants.prefix_lm import PREFIX_LM
from pallas_kernels.attention.variants.request_bias import REQUEST_BIAS
from pallas_kernels.attention.variants.sinks import SINKS
from pallas_kernels.attention.variants.sliding_window import SLIDING_WINDOW
from pallas_kernels.attention.variants.softcap import SOFTCAP
from pallas_kernels.attention.variants.t5_bias import T5_BIAS
from pallas_kernels.attention.variants.token_bias import TOKEN_BIAS

VARIANTS: dict[str, AttentionVariant] = {
    variant.name: variant
    for variant in (
        CAUSAL,
        SLIDING_WINDOW,
        SOFTCAP,
        ALIBI,
        SINKS,
        PREFIX_LM,
        DOCUMENT_MASK,
        T5_BIAS,
        DILATED,
        BLOCK_GLOBAL,
        HEAD_WINDOWS,
        REQUEST_BIAS,
        TOKEN_BIAS,
        FORGETTING,
    )
}
