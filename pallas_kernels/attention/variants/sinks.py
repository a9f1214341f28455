"""A learned logit per head that takes part in softmax and has no value, so that a head may attend
to nothing (gpt-oss, arXiv:2508.10925; after Xiao et al. 2023, arXiv:2309.17453).
"""

from pallas_kernels.attention.variant import AttentionVariant, Param

SINKS = AttentionVariant("sinks", sinks="sink", params=(Param("sink", "per_head", default=0.0),))
