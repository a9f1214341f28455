"""Which attention variant a layer has: by name, from a user's file, or from a file of layers."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jaxllm.attention.layers import computed_by, find_layer, layer_class
from jaxllm.attention.user_file import from_user_file, split_name
from jaxllm.config.model import AttentionChoice, ModelConfig, RowParam
from jaxllm.errors import ConfigError
from jaxllm.parallel.cuts import AXIS
from jaxllm.weights.json_file import read_json_object
from pallas_kernels.attention.head_shares import shared_out
from pallas_kernels.attention.variant import AttentionVariant, Param, VariantError
from pallas_kernels.attention.variant_check import check_answers
from pallas_kernels.attention.variant_functions import check_functions
from pallas_kernels.attention.variants import VARIANTS

_registered: dict[str, AttentionVariant] = {}


def register_variant(variant: AttentionVariant, name: str | None = None) -> None:
    """Make a variant of this process known by ``name`` (default: its own), once its functions have
    been traced. A name of ours cannot be taken; a registered one is replaced.

    Raises:
        VariantError: its functions cannot serve; says what to do.
    """
    name = name or variant.name
    if name in VARIANTS:
        raise VariantError(f"{name!r} is the name of a built-in variant: choose another")
    check_functions(variant)
    _registered[name] = variant
    variant_of.cache_clear()


def find_variant(name: str) -> AttentionVariant:
    """By name, or "FILE.py:NAME"; ":NAME" may be left out where the file holds one variant.

    Raises:
        ConfigError: there is no such variant or file, or it is wrong.
    """
    file = split_name(name)
    if name not in VARIANTS and name not in _registered and file is not None:
        try:
            register_variant(from_user_file(*file, _is_variant, "attention variant"), name)
        except VariantError as error:
            raise ConfigError(f"--attention {name}: {error}") from error
    found = VARIANTS.get(name) or _registered.get(name)
    if found is None:
        if name.endswith(".json"):
            raise ConfigError(f"{name} is a file of layers: name one of its variants here.")
        known = ", ".join([*VARIANTS, *_registered])
        raise ConfigError(f"There is no attention variant {name!r}; known: {known}, FILE.py:NAME.")
    return found


def _is_variant(value: Any) -> bool:
    return isinstance(value, AttentionVariant)


def choose_attention(
    attention: str | None, params_file: str | None, model: ModelConfig
) -> tuple[AttentionChoice, ...]:
    """What ``--attention`` and ``--attention-params`` say of every layer; () for a model's own.

    A file of layers is ``{"layers": [...]}``, each a variant's name or ``{"layer": NAME,
    "variant": NAME, "params": {}}`` with any of the three, repeated until the model has no more
    layers. ``params_file`` holds values for all layers that declare them and have none of their
    own.

    A variant that is not ours is compared with the reference first, on random pages.

    Raises:
        ConfigError: an unknown layer, variant or param, a value of a wrong shape, or a variant that
            gives other answers by pages than it should.
    """
    if attention is None:
        if params_file is not None:
            raise ConfigError("--attention-params needs --attention.")
        return ()
    if not isinstance(attention, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "attention takes a name, 'FILE.py:NAME' or 'FILE.json'. A variant of your process gets "
            "a name by jaxllm.attention.variants.register_variant."
        )
    entries: list[Any] = [attention]
    if attention.endswith(".json"):
        held = read_json_object(Path(attention))
        _refuse_others(attention, held, {"layers"})
        entries = held.get("layers") or []  # pyright: ignore
    shared = read_json_object(Path(params_file)) if params_file is not None else {}
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{attention} must hold {{"layers": [...]}} with one entry at least.')
    parsed = [_choice(entry, shared, model.num_heads) for entry in entries]
    unused = set(shared) - {name for choice in parsed for name, _ in choice.values}
    if unused:
        raise ConfigError(f"{params_file}: no variant of this model takes {min(unused)!r}.")
    for name in dict.fromkeys(choice.variant for choice in parsed):
        if name in _registered:
            _check_answers(name)
    chosen = tuple(parsed[layer % len(parsed)] for layer in range(model.num_layers))
    declared_alike(chosen)
    return chosen


def _check_answers(name: str) -> None:
    try:
        check_answers(_registered[name])
    except VariantError as error:
        raise ConfigError(f"--attention {name}: {error}.") from error


def _choice(entry: Any, shared: Mapping[str, Any], num_heads: int) -> AttentionChoice:
    if isinstance(entry, str):
        entry = {"variant": entry}
    named = isinstance(entry, dict) and ("variant" in entry or "layer" in entry)
    name, layer = (entry.get("variant", "causal"), entry.get("layer", "")) if named else (None, "")
    if not isinstance(name, str) or not isinstance(layer, str):
        raise ConfigError(
            'A layer is a name or {"layer": NAME, "variant": NAME, "params": {}}, not '
            f"{entry!r}."
        )
    _refuse_others(f"A layer with {name}", entry, {"layer", "variant", "params"})
    if layer:
        find_layer(layer)
    variant, own = find_variant(name), entry.get("params", {})
    try:
        values = {p.name: shared[p.name] for p in variant.params if p.name in shared} | own
        bound = variant.bind(values, num_heads)
        for param in bound.params:
            param.value(num_heads)
    except (VariantError, TypeError) as error:
        raise ConfigError(f"Attention variant {name}: {error}.") from error
    if any(param.name == bound.lookahead and param.default != 0 for param in bound.params):
        raise ConfigError(
            f"{name}: {bound.lookahead} is how much of a prompt sees ahead, which each request "
            "says of its own (attention_params). Its default must be 0."
        )
    kept = tuple((p.name, p.default) for p in bound.params if p.name in values)
    return AttentionChoice(name, kept, layer)


def _refuse_others(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    if others := sorted(set(given) - known):
        raise ConfigError(f"{what} has {others[0]!r}; known: {', '.join(sorted(known))}.")


def declared_alike(choices: tuple[AttentionChoice, ...]) -> tuple[Param, ...]:
    """What requests may bring for any layer. Raises ConfigError where two variants mean different
    things by one name."""
    found: dict[str, Param] = {}
    for choice in dict.fromkeys(choices):
        for param in _bound(choice).row_params:
            if found.setdefault(param.name, param) != param:
                raise ConfigError(
                    f"Two attention variants of this model declare {param.name!r} differently."
                )
    return tuple(found.values())


def _bound(choice: AttentionChoice) -> AttentionVariant:
    return find_variant(choice.variant).bind(dict(choice.values))


@cache
def variant_of(model: ModelConfig, layer: int) -> AttentionVariant:
    variant = _bound(model.attention[layer]) if model.attention else VARIANTS["causal"]
    return variant if model.shards == 1 else shared_out(variant, AXIS)


def row_params(model: ModelConfig) -> tuple[Param, ...]:
    """What a request may bring, in the order in which its row keeps it."""
    return declared_alike(model.attention)


def request_params(model: ModelConfig, longest_span: int) -> tuple[RowParam, ...]:
    """The same for who checks requests and knows no JAX. ``longest_span``: tokens of one row that
    a step can always feed."""
    ahead = {variant_of(model, layer).lookahead for layer in range(model.num_layers)}
    per_row = tuple(
        RowParam(
            param.name,
            param.size,
            param.dtype == "int32",
            longest_span if param.name in ahead else None,
        )
        for param in row_params(model)
    )
    per_token = (RowParam(p.name, None, False, per_token=True) for p in token_params(model))
    return (*per_row, *per_token)


def token_params(model: ModelConfig) -> tuple[Param, ...]:
    """What a request may bring for each token of its prompt: what no layer computes of them.

    Raises ConfigError where two variants mean different things by one name.
    """
    found: dict[str, Param] = {}
    for layer in range(model.num_layers):
        layer_type = layer_class(model, layer)
        variant = layer_type.spec_of(model, layer).variant
        computed = computed_by(layer_type)
        for param in variant.token_params:
            if param.name not in computed and found.setdefault(param.name, param) != param:
                raise ConfigError(
                    f"Two attention variants of this model declare {param.name!r} differently."
                )
    return tuple(found.values())


def functions_of(model: ModelConfig) -> tuple[Callable[..., Any], ...]:
    """The functions of all variants of the model."""
    variants = {variant_of(model, layer) for layer in range(model.num_layers)}
    fields = [(v.score_mod, v.mask_mod, v.kv_range) for v in variants]
    return tuple(f for functions in fields for f in functions if inspect.isfunction(f))
