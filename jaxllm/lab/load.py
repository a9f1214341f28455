"""The variant that a tool of the lab was asked about, with the values it was given."""

from typing import Any

from jaxllm.attention.variants import find_variant
from jaxllm.errors import ConfigError
from pallas_kernels.attention.variant import AttentionVariant, VariantError


def load_variant(name: str, values: dict[str, Any] | None, num_heads: int) -> AttentionVariant:
    """``values`` of any params; what requests bring becomes what all of them bring.

    Raises:
        ConfigError: there is no such variant, or a value does not fit it or ``num_heads``.
    """
    try:
        return find_variant(name).bind(values or {}, num_heads)
    except VariantError as error:
        raise ConfigError(f"{name}: {error}") from error
