"""What an operation must offer to be timed and tuned."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pallas_kernels.bench.timing import busy_seconds, median_seconds

XLA_CALLS = 2  # per dispatch: the loops of plain XLA are long, and compile for long


@dataclass(frozen=True)
class Timed:
    """A program on random data. Nothing is compiled before the first dispatch."""

    dispatch: Callable[[], Any]
    calls: int  # chained in the program
    queued: int = 3  # dispatches under way at once

    def seconds(self, runs: int) -> float:
        """Median of one call."""
        return median_seconds(self.dispatch, calls=self.calls, queued=self.queued, runs=runs)

    def busy_seconds(self) -> float | None:
        """Of one call, without the gaps between launches; None where no profiler tells."""
        return busy_seconds(self.dispatch, calls=self.calls)


class Operation[Spec, Config](ABC):
    """One folder of pallas_kernels, seen by who measures it. ``Config`` is a frozen dataclass."""

    name: str
    unit: Literal["byte", "flop"]  # of ``amount``
    speed: Sequence[Spec]  # shapes for an accelerator
    small: Sequence[Spec]  # shapes for a CPU

    @abstractmethod
    def label(self, spec: Spec) -> str: ...

    @abstractmethod
    def amount(self, spec: Spec) -> int:
        """Bytes that one call must move, or operations that it must do."""

    @abstractmethod
    def default(self, spec: Spec) -> Config:
        """The config that the code chooses for the shape, before any tuning."""

    def where(self, spec: Spec) -> dict[str, Any]:
        """Facts of the shape by which shapes of one default are tuned apart."""
        return {}

    @property
    def tuned_on(self) -> Sequence[Spec]:
        return self.speed

    @abstractmethod
    def grid(self, default: Config, num_sms: int) -> Sequence[dict[str, Any]]:
        """What tuning tries in place of these fields of ``default``; the default's own first.

        Never a field that fixes the bits of attention, so that a tuned device answers as an
        untuned one.
        """

    @abstractmethod
    def refuses(self, spec: Spec, config: Config, platform: str) -> str | None:
        """Why the kernel does not take the shape, or None."""

    def xla_refuses(self, spec: Spec) -> str | None:
        """Why plain XLA does not take the shape either, or None."""
        return None

    @abstractmethod
    def timed(self, spec: Spec, config: Config | None) -> Timed:
        """The kernel with ``config``; plain XLA with None."""

    @abstractmethod
    def checker(self) -> Callable[[Config], str | None]:
        """Tells what is wrong with the kernel's answers under a config, or None."""
