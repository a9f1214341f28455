"""Whether an engine can honour a request's taps and interventions."""

from typing import TYPE_CHECKING

from jaxllm.errors import InvalidRequestError
from jaxllm.taps.interventions import check_fit
from jaxllm.taps.positions import check_reach, tapped_between
from jaxllm.taps.sites import TapShapes, check_sites

if TYPE_CHECKING:
    from jaxllm.sampling_params import SamplingParams

MAX_TAP_BYTES = 32 * 2**20  # of one request; twice that is what a message between processes holds


def check_taps(
    params: "SamplingParams", prompt_len: int, max_tokens: int, shapes: TapShapes | None
) -> None:
    """``shapes`` None: the engine was not started for taps.

    Raises:
        InvalidRequestError: a site, layer, head or position that there is not, a vector of
            another length, or more than is read for one request.
    """
    if not params.taps and not params.interventions:
        return
    if shapes is None:
        raise InvalidRequestError(
            "This engine was not started for taps and interventions: start it with --taps.",
            param="taps" if params.taps else "interventions",
            code="taps_not_enabled",
        )
    num_fed = prompt_len + max(max_tokens - 1, 0)  # the last token is sampled, but never fed
    check_fit(params.interventions or (), shapes, num_fed)
    sites = check_sites(params.taps or (), shapes)
    check_reach(params.tap_positions, prompt_len, num_fed)
    positions = tapped_between(params.tap_positions, prompt_len, 0, num_fed)
    mean = sum(positions) / max(len(positions), 1)
    values = len(positions) * sum(site.num_values(mean, shapes) for site in sites)
    if 4 * values > MAX_TAP_BYTES:
        raise InvalidRequestError(
            f"The taps of this request are {4 * values / 2**20:.1f} MiB, more than the "
            f"{MAX_TAP_BYTES // 2**20} MiB that one request may read: name fewer taps or positions"
            ", or lower max_tokens.",
            param="taps",
            code="taps_too_large",
        )
