"""All operations, and one shape of one of them measured beside the ceilings."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from pallas_kernels.bench.ceilings import Ceilings
from pallas_kernels.bench.decode import DecodeOperation
from pallas_kernels.bench.gated_matmul import GatedOperation
from pallas_kernels.bench.kv_write import KVWriteOperation
from pallas_kernels.bench.norm import NormOperation
from pallas_kernels.bench.operation import Operation
from pallas_kernels.bench.prefill import PrefillOperation
from pallas_kernels.bench.sampling import SamplingOperation
from pallas_kernels.tuning.table import tuned

OPERATIONS: dict[str, Operation[Any, Any]] = {
    operation.name: operation
    for operation in (
        DecodeOperation(),
        PrefillOperation(),
        KVWriteOperation(),
        SamplingOperation(),
        NormOperation(),
        GatedOperation(),
    )
}


@dataclass(frozen=True)
class Case:
    op: str
    spec: Any

    @property
    def shape(self) -> str:
        return OPERATIONS[self.op].label(self.spec)


@dataclass(frozen=True)
class Measurement:
    """``seconds``, ``rate`` and ``of_ceiling`` are None where nothing was measured,
    ``busy_seconds`` and ``busy_rate`` also where there is no profiler.
    """

    op: str
    shape: str
    path: Literal["kernel", "xla", "none"]
    refused: tuple[str, ...]  # by what would have come first, and why
    config: dict[str, Any] | None  # of the kernel
    unit: Literal["byte", "flop"]
    seconds: float | None = None
    rate: float | None = None  # units per second
    of_ceiling: float | None = None
    busy_seconds: float | None = None  # the device at work, without gaps between launches
    busy_rate: float | None = None
    failure: str | None = None


def cases(names: Iterable[str]) -> list[Case]:
    """The shapes of these operations: all for speed, on a CPU the small ones."""
    size = "small" if jax.default_backend() == "cpu" else "speed"
    return [Case(name, spec) for name in names for spec in getattr(OPERATIONS[name], size)]


def target_platform() -> str:
    """As the kernels name it: "sm_90" for Hopper, otherwise JAX's name."""
    device: Any = jax.devices()[0]
    hopper = getattr(device, "compute_capability", None) == "9.0"
    return "sm_90" if hopper else device.platform


def measure(case: Case, ceilings: Ceilings) -> Measurement:
    """Times the form that serves the shape here. A failure is a field: it must not hide the rest of
    a run.
    """
    operation, device = OPERATIONS[case.op], jax.devices()[0]
    default, where = operation.default(case.spec), operation.where(case.spec)
    config = tuned(case.op, device.device_kind, default, where=where)
    kernel = operation.refuses(case.spec, config, target_platform())
    xla = None if kernel is None else operation.xla_refuses(case.spec)
    path = "kernel" if kernel is None else "xla" if xla is None else "none"
    chosen = config if path == "kernel" else None
    measurement = Measurement(
        op=case.op,
        shape=case.shape,
        path=path,
        refused=tuple(reason for reason in (kernel, xla) if reason is not None),
        config=None if chosen is None else dataclasses.asdict(chosen),
        unit=operation.unit,
    )
    if path == "none":
        return measurement
    try:
        runs = 3 if device.platform == "cpu" else 20
        timed = operation.timed(case.spec, chosen)
        seconds, busy = timed.seconds(runs), timed.busy_seconds()
    except Exception as error:  # whatever a compiler raises
        text = " ".join(str(error).split())[:300]
        return dataclasses.replace(measurement, failure=f"{type(error).__name__}: {text}")
    amount = operation.amount(case.spec)
    ceiling = ceilings[0] if operation.unit == "byte" else ceilings[1]
    return dataclasses.replace(
        measurement,
        seconds=seconds,
        rate=amount / seconds,
        of_ceiling=amount / seconds / ceiling,
        busy_seconds=busy,
        busy_rate=amount / busy if busy else None,
    )
