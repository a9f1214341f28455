"""SchedulingConfig: the part of an EngineConfig that the scheduler follows."""

from dataclasses import dataclass

from jaxllm.errors import ConfigError

POLICY_NAMES = ("fcfs", "priority", "fair")
WEIGHTS = (1e-3, 1e3)  # the lowest and the highest


@dataclass(frozen=True, slots=True)
class SchedulingConfig:
    policy: str = "fcfs"
    tenant_weights: tuple[str, ...] = ()  # TENANT=WEIGHT
    long_prefill_token_threshold: int | None = None  # tokens; None: a quarter of a step's

    def weight_by_tenant(self) -> dict[str, float]:
        """Raises ConfigError for what is not TENANT=WEIGHT, or weighs too little or too much."""
        return dict(map(_weight, self.tenant_weights))


def _weight(item: str) -> tuple[str, float]:
    tenant, _, number = item.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    low, high = WEIGHTS
    if not tenant or not low <= weight <= high:
        raise ConfigError(
            f"--tenant-weights {item} must be TENANT=WEIGHT, such as 3f9c0a1b2c4d=2, with a weight "
            f"from {low} to {high:g}."
        )
    return tenant, weight
