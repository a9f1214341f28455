"""Which requests were served as fast as promised."""

import math
from dataclasses import dataclass

from jaxllm.bench.request_record import RequestRecord
from jaxllm.errors import ConfigError

NAMES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True)
class Goodput:
    """Upper bounds in seconds, by name. ``itl`` bounds every gap of a request, not their mean."""

    bounds: dict[str, float]

    @classmethod
    def parse(cls, items: list[str]) -> "Goodput":
        """From ``["ttft:200", "itl:50"]``, in milliseconds. Raises ConfigError."""
        bounds: dict[str, float] = {}
        for item in items:
            name, _, value = item.partition(":")
            try:
                milliseconds = float(value)
            except ValueError:
                milliseconds = math.nan
            if name not in NAMES or not 0 < milliseconds < math.inf:
                raise ConfigError(
                    f"--goodput {item}: expected NAME:MILLISECONDS, with a name of "
                    f"{', '.join(NAMES)}."
                )
            bounds[name] = milliseconds / 1000
        return cls(bounds)

    def met_by(self, record: RequestRecord) -> bool:
        measured = {
            "ttft": record.ttft,
            "tpot": record.tpot or 0.0,
            "itl": max(record.itl, default=0.0),
            "e2e": record.e2e,
        }
        return all(measured[name] <= bound for name, bound in self.bounds.items())
