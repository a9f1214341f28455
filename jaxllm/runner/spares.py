"""Results of earlier steps that nobody needs any more, for those of later steps to be written over.

XLA records a program as a CUDA graph and, before it launches it again, records anew whatever uses
an allocation that lies elsewhere than last time. A result in fresh memory moves what is allocated
after it, temporaries first, which every kernel uses: 3 to 4 ms of the host's time for a step of 32
layers (figures in NOTES.md). So results are given memory as the KV cache is, by donating arrays of
their shapes, which no program reads.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

MOST_KEPT = 2  # of each result: a step's are fetched while the next one's are being written


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled program. ``overwrites``: shapes of the arrays that its results are written over, a
    list of which is its last argument; where there are none, neither is the argument.
    """

    kind: str
    executable: Any
    overwrites: tuple[jax.ShapeDtypeStruct, ...] = ()

    def __call__(self, *args: Any) -> Any:
        return self.executable(*args)


class Spares:
    """Each array is written over by the same result of the same kind of program, so that one step
    finds its arrays where the last one had them. Whoever gives arrays must not read them any more;
    JAX raises RuntimeError for one that was overwritten.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[jax.Array]] = defaultdict(list)

    def run(self, program: Program, *args: Any) -> Any:
        """A program that overwrites; the others are called."""
        specs = enumerate(program.overwrites)
        return program(*args, [self._take(program.kind, index, spec) for index, spec in specs])

    def give(self, kind: str, results: Any) -> None:
        """All that such a program left, but what it updated in place."""
        for index, array in enumerate(jax.tree.leaves(results)):
            kept = self._kept[kind, index, array.shape, array.dtype]
            if len(kept) < MOST_KEPT:
                kept.append(array)

    def _take(self, kind: str, index: int, spec: jax.ShapeDtypeStruct) -> jax.Array:
        kept = self._kept[kind, index, spec.shape, spec.dtype]
        if kept:
            return kept.pop(0)
        # Copied, not made there: that would compile a program for each shape.
        return jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
