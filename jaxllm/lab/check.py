"""``jaxllm lab check``: does an attention variant compute the same wherever it may be served?"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.attention.variants import find_variant
from jaxllm.errors import ConfigError
from pallas_kernels.attention.prefill_problem import PrefillProblem
from pallas_kernels.attention.variant import CAUSAL, VariantError
from pallas_kernels.attention.variant_check import (
    FLOAT32_ERROR,
    SHAPE,
    Case,
    by_kernels,
    by_xla,
    hidden_by_range,
    largest_error,
    make_case,
    not_finite,
    reference,
    why_not_lowered,
)
from pallas_kernels.attention.variant_functions import check_functions

_BFLOAT16 = 1e-2  # what rounding to it may cost, beside the length of the answer


@dataclass(frozen=True)
class Finding:
    """One line of the table. ``ok`` None: not tried here."""

    what: str
    ok: bool | None
    said: str


def check_variant(
    name: str, values: dict[str, Any] | None = None, *, interpret: bool = False
) -> list[Finding]:
    """``values`` of params, those that requests bring among them.

    Raises:
        ConfigError: there is no such variant, or a value does not fit it.
    """
    values = values or {}
    variant = find_variant(name)
    try:
        brought = {p.name: values[p.name] for p in variant.row_params if p.name in values}
        for param in variant.row_params:
            if param.size is not None and np.ndim(brought.get(param.name, ())) == 0:
                raise VariantError(f"{param.name} takes a list of {param.size} numbers")
        rest = {key: value for key, value in values.items() if key not in brought}
        variant = variant.bind(rest, SHAPE.heads)
        case = make_case(variant, brought)
        check_functions(variant)
    except VariantError as error:
        raise ConfigError(str(error)) from error
    if (found := not_finite(case)) is not None:
        return [Finding("scores are finite", False, found)]
    narrow = make_case(variant, brought, dtype="bfloat16")
    findings = [
        _against_plain(case),
        _compare("XLA = float32 reference", lambda: (by_xla(case), reference(case)), FLOAT32_ERROR),
        _compare("chunked = whole", lambda: _parted(case, 15), FLOAT32_ERROR),
        _compare("decode = prefill", lambda: _parted(case, 1), FLOAT32_ERROR),
        _compare("pages in another order", lambda: (_permuted(case), by_xla(case)), 0.0),
        _range(case),
    ]
    reason = why_not_lowered(narrow)
    findings.append(Finding("lowers for sm_90", reason is None, reason or "decode and prefill"))
    if reason is not None or not interpret:
        return [*findings, Finding("kernels = reference", None, "use --interpret")]
    return [*findings, _compare("kernels = reference", lambda: _by_kernels(narrow), _BFLOAT16)]


def table(findings: list[Finding]) -> list[str]:
    words = {True: "ok", False: "FAILED", None: "-"}
    width = max(len(finding.what) for finding in findings)
    return [f"{f.what:{width}}  {words[f.ok]:6}  {f.said}" for f in findings]


def _compare(what: str, pair: Callable[[], tuple[Any, Any]], bound: float) -> Finding:
    got, want = pair()
    used = min(len(got), SHAPE.tokens - SHAPE.padding)
    error = largest_error(got[:used], want[:used])
    return Finding(what, error <= bound, f"error {error:.1e}, at most {bound:.0e}")


def _against_plain(case: Case) -> Finding:
    """What follows says little of functions that change nothing."""
    plain = reference(dataclasses.replace(case, variant=CAUSAL, row_params={}))
    changed = largest_error(reference(case), plain)
    if changed > FLOAT32_ERROR:
        return Finding("differs from causal", True, f"by {changed:.1e}")
    longest = max(sum(row) for row in SHAPE.rows)
    said = f"not on {longest} tokens with these values: give others by --params"
    return Finding("differs from causal", None, said)


def _range(case: Case) -> Finding:
    what = "kv_range hides nothing"
    if case.variant.kv_range is None:
        return Finding(what, None, "there is none: all pages are read")
    hidden = hidden_by_range(case)
    return Finding(what, hidden is None, hidden or "of one query and of 64")


def _by_kernels(case: Case) -> tuple[Any, Any]:
    decodes = SHAPE.decode_rows
    with warnings.catch_warnings():  # the interpreter multiplies stale NaN, which are masked later
        warnings.simplefilter("ignore", RuntimeWarning)
        decoded, prefilled = map(np.asarray, by_kernels(case, interpret=True))
    got = np.concatenate([decoded[:decodes], prefilled[decodes:]]).astype(np.float32)
    return got, reference(case)


def _permuted(case: Case) -> Any:
    count = case.problem.kv.shape[0]
    order = np.concatenate([[0], np.random.default_rng(3).permutation(count - 1) + 1])
    tables = jnp.asarray(np.argsort(order).astype(np.int32))[case.problem.block_tables]
    moved = case.problem._replace(kv=case.problem.kv[order], block_tables=tables)
    numbers = None if case.token_pages is None else case.token_pages[order]
    return by_xla(dataclasses.replace(case, problem=moved, token_pages=numbers))


def _parted(case: Case, count: int) -> tuple[Any, Any]:
    """The last ``count`` tokens of the last row, alone in a step (one: as a decode row) and with
    all others of its prompt."""
    end = SHAPE.tokens - SHAPE.padding
    length, row, decodes = sum(SHAPE.rows[-1]), len(SHAPE.rows) - 1, int(count == 1)
    spec = dataclasses.replace(
        SHAPE, rows=((length - count, count),), decode_rows=decodes, padding=0
    )
    slots, problem = np.array([row, row + 1]), case.problem
    alone = PrefillProblem(
        jnp.pad(problem.q[end - count : end], ((0, max(0, 2 - count)), (0, 0), (0, 0))),
        problem.kv,
        problem.block_tables[slots],
        jnp.asarray([0, count, count], jnp.int32),
        problem.seq_lens[slots],
        jnp.int32(decodes),
    )
    spec = dataclasses.replace(spec, padding=max(0, 2 - count))
    brought = {name: value[slots] for name, value in case.row_params.items()}
    got = by_xla(Case(case.variant, spec, alone, brought, case.token_pages))
    return got[:count], by_xla(case)[end - count : end]
