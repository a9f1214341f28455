"""DeviceMesh: the devices that one engine computes on, and what of an array each of them has.

The only place that knows of more than one. Programs, and the sizes in plans and memory reports, are
those of one device; every device runs the same program on its part, by ``jax.shard_map``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.errors import ConfigError
from jaxllm.parallel.cuts import AXIS, Cut

WHOLE = PartitionSpec()  # every device has all of it
KV_PAGES = PartitionSpec(None, None, AXIS)  # by KV head: pages, and numbers of tokens
KV_BLOCK = PartitionSpec(AXIS)  # a block's contents, device by device
BY_HEAD = PartitionSpec(AXIS)  # what a variant has a number of for every head
BY_ROW = PartitionSpec(AXIS)  # products of which devices have some rows
# A spec for each of a program's arguments or results, or for all that one of them holds.
Specs = Any


class DeviceMesh:
    """``shards`` devices of this process. With one nothing is wrapped, and arrays lie where JAX
    puts them.
    """

    def __init__(self, shards: int = 1):
        """Raises ConfigError: there are fewer devices."""
        devices = jax.devices()
        if shards > len(devices):
            raise ConfigError(
                f"--tensor-parallel-size is {shards}, but this process sees {len(devices)} "
                f"device(s) ({devices[0].device_kind}). Lower it, or let the process see more "
                "(CUDA_VISIBLE_DEVICES)."
            )
        self.shards = shards
        self._first = devices[0]
        self._mesh = jax.sharding.Mesh(np.array(devices[:shards]), (AXIS,)) if shards > 1 else None

    def sharding(self, spec: PartitionSpec = WHOLE) -> NamedSharding | None:
        """None: where JAX puts it."""
        return None if self._mesh is None else NamedSharding(self._mesh, spec)

    def locked(self, spec: PartitionSpec) -> jax.sharding.Sharding:
        """In memory of the host that the devices' copy engines read and write."""
        return self.placed(spec).with_memory_kind("pinned_host")

    def placed(self, spec: PartitionSpec) -> jax.sharding.Sharding:
        """On the devices, by name even where there is one."""
        return self.sharding(spec) or SingleDeviceSharding(self._first)

    def put(self, values: Any, spec: PartitionSpec = WHOLE) -> Any:
        """Begin to copy arrays of the host to the devices."""
        return jax.device_put(values, self.sharding(spec))

    def place(self, arrays: Any, specs: Specs) -> Any:
        """Arrays of one device, shared out. ``specs``: one for each."""
        return jax.tree.map(
            lambda spec, array: self.put(array, spec), specs, arrays, is_leaf=_is_spec
        )

    def zeros(self, part: jax.ShapeDtypeStruct, spec: PartitionSpec = WHOLE) -> jax.Array:
        """``part``: what each device gets."""
        whole: jax.ShapeDtypeStruct = self.whole(part, spec)
        return jnp.zeros(whole.shape, whole.dtype, device=whole.sharding)

    def whole(self, parts: Any, specs: Specs) -> Any:
        """Abstract arrays of all devices together, from those of one."""
        if self._mesh is None:
            return parts

        def grown(spec: PartitionSpec, part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            names = (*spec, *(None,) * (len(part.shape) - len(spec)))
            pairs = zip(part.shape, names, strict=True)
            shape = tuple(size if name is None else size * self.shards for size, name in pairs)
            return jax.ShapeDtypeStruct(shape, part.dtype, sharding=self.sharding(spec))

        return jax.tree.map(
            lambda spec, each: jax.tree.map(lambda part: grown(spec, part), each),
            specs,
            parts,
            is_leaf=_is_spec,
        )

    def spread(self, function: Callable[..., Any], given: Specs, made: Specs) -> Callable[..., Any]:
        """``function`` of one device's parts as a function of arrays of all. What it computes of
        equal arguments must be equal everywhere: nobody compares.
        """
        if self._mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=given, out_specs=made, check_vma=False
        )


def param_specs(cuts: Iterable[Cut | None]) -> tuple[PartitionSpec, ...]:
    """Of parameters."""
    return tuple(WHOLE if cut is None else PartitionSpec(*(None,) * cut.axis, AXIS) for cut in cuts)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
