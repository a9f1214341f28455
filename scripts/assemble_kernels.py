"""What the assembler makes of the Hopper kernels, on a machine without a GPU.

    scripts/assemble_kernels.sh [OPERATION...] [--variant NAME...] [--keep FOLDER]

Prints registers, spilled bytes and instructions of each kernel. Exits with 1 where the assembler
gave up overlapping matrix products, or where registers of a product are touched while it may be
under way: ptxas before 13.3 may do that to a left operand (triton-lang/triton#9433).
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Of an H100 (XLA's xla/backends/gpu/target_config/specs): what a compiler asks of a device.
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  core_count: 132  fpus_per_core: 128
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
  clock_rate_ghz: 1.98  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GIVEN_UP = re.compile(r"wgmma\.mma_async instructions are serialized[^']*")


class Report(NamedTuple):
    """Of one kernel."""

    registers: int
    spilled: int  # bytes
    instructions: int
    faults: list[str]


def report(ptxas: str, machine_code: str) -> Report:
    """From what ptxas said and nvdisasm printed."""
    code = list(_instructions(machine_code))

    def number(pattern: str) -> int:
        found = re.search(pattern, ptxas)
        return int(found[1]) if found else 0

    registers, spilled = number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores")
    faults = sorted(set(_GIVEN_UP.findall(ptxas))) + touched_too_early(code)
    return Report(registers, spilled, len(code), faults)


class Instruction(NamedTuple):
    address: str
    text: str  # without its predicate
    always: bool  # there is none
    labels: tuple[str, ...]  # by which branches find it


def _instructions(machine_code: str) -> Iterator[Instruction]:
    labels: list[str] = []
    for line in machine_code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels.append(label[1])
        found = re.search(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*)", line)
        if found:
            yield Instruction(found[1], found[3].strip(), not found[2], tuple(labels))
            labels.clear()


# Products that may be under way, by group as they are waited for, the last one still open: each a
# register, the address of its product, and whether the product sums there.
_Groups = tuple[frozenset[tuple[int, str, bool]], ...]


def touched_too_early(code: Sequence[Instruction]) -> list[str]:
    """What touches registers of a product that may be under way on some path: reads or writes its
    sums, writes its left operand. Of what one instruction reads, only the first register of each
    operand is looked at."""
    places = {label: index for index, one in enumerate(code) for label in one.labels}
    paths: list[tuple[int, _Groups]] = [(0, (frozenset(),))]
    seen, faults = set[tuple[int, _Groups]](), set[str]()
    while paths:
        index, groups = paths.pop()
        while index < len(code):
            one = code[index]
            if one.labels:
                if (index, groups) in seen:
                    break
                seen.add((index, groups))
            groups, found = _after(one, groups)
            faults |= found
            operation = one.text.split()[0]
            if operation.startswith("BRA") and (label := re.search(r"\.L_\w+", one.text)):
                paths.append((places[label[0]], groups))
            if one.always and operation in ("BRA", "EXIT"):
                break
            index += 1
    return sorted(faults)


def _after(one: Instruction, groups: _Groups) -> tuple[_Groups, set[str]]:
    """What is under way behind an instruction, and what it touches of that."""
    operation, _, operands = one.text.partition(" ")
    *closed, still_open = groups
    if operation.startswith("WARPGROUP.DEPBAR"):
        kept = closed[max(len(closed) - int(one.text.split()[-1], 16), 0) :]
        return (*kept, still_open), set()
    if product := re.match(r"HGMMA\.64x(\d+)x\S+\s+R(\d+),\s+(?:R(\d+))?", one.text):
        columns, sums, left = (int(number or 0) for number in product.groups())
        own = {(sums + i, one.address, True) for i in range(columns // 2)}
        own |= {(left + i, one.address, False) for i in range(4 if product[3] else 0)}
        still_open |= own
        return (*closed, still_open, *[frozenset()] * ("gsb0" in operands)), set()
    written = set(_written(operation, operands))
    touched = written | {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}
    return groups, {
        f"{one.address} {one.text} touches what {product} has under way"
        for register, product, sums_there in frozenset().union(*groups)
        if register in written or (sums_there and register in touched)
    }


def _written(operation: str, operands: str) -> range:
    """Registers."""
    target = re.match(r"\s*(?:U?P\w+,\s+)?R(\d+)", operands)
    if not target or operation.startswith(("ST", "SYNCS", "RED", "BAR", "BRA", "UTMA", "R2UR")):
        return range(0)
    if ".128" in operation or (operation.startswith("LDSM") and operation.endswith(".4")):
        wide = 4
    elif ".64" in operation or "WIDE" in operation or operation == "CS2R":
        wide = 2
    else:
        wide = 1
    return range(int(target[1]), int(target[1]) + wide)


@contextmanager
def dumping(folder: Path) -> Iterator[None]:
    """Mosaic leaves the code of what is compiled meanwhile in ``folder``."""
    told = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS")}
    os.environ |= told | {"MOSAIC_GPU_DUMP_TO": str(folder)}
    try:
        yield
    finally:
        for name in (*told, "MOSAIC_GPU_DUMP_TO"):
            del os.environ[name]
        for log in folder.glob("*.log"):  # a hundred megabytes each
            log.unlink()


def programs(operations: Sequence[str], variants: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and functions without arguments. Only their kernels matter, so shapes are small."""
    from pallas_kernels.attention.variant_check import by_kernels, make_case
    from pallas_kernels.attention.variants import VARIANTS
    from pallas_kernels.bench.suite import OPERATIONS

    for name in operations:
        operation = OPERATIONS[name]
        for spec in operation.small:
            config = operation.default(spec)
            if operation.refuses(spec, config, "sm_90") is None:
                timed = operation.timed(spec, config)
                yield f"{name} {operation.label(spec)}", timed.dispatch
    for name in variants:
        case = make_case(VARIANTS[name], dtype="bfloat16")
        yield f"variant {name}", lambda case=case: by_kernels(case, interpret=False)


def compiler() -> Callable[[Callable[[], Any]], None]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(
        "hopper", platform="cuda", target_config=HOPPER, topology="1x1x1"
    ).devices[0]

    def compile_for_hopper(function: Callable[[], Any]) -> None:
        jitted = jax.jit(function, out_shardings=SingleDeviceSharding(device))
        jitted.trace().lower(lowering_platforms=("cuda",)).compile()

    return compile_for_hopper


def main() -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: it asks for no GPU then
    from pallas_kernels.attention.variants import VARIANTS
    from pallas_kernels.bench.suite import OPERATIONS

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("operations", nargs="*", choices=[*OPERATIONS, []], default=[])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=[])
    parser.add_argument("--keep", type=Path, help="folder for PTX and machine code")
    words = parser.parse_args()
    everything = not words.operations and not words.variant
    asked = (list(OPERATIONS), list(VARIANTS)) if everything else (words.operations, words.variant)
    compile_for_hopper, faulty = compiler(), 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, function) in enumerate(programs(*asked)):
            folder = (words.keep or Path(scratch)) / f"{number:02} {name}"
            folder.mkdir(parents=True)
            with dumping(folder):
                compile_for_hopper(function)
            for found in sorted(folder.glob("*.ptxas")):
                code = found.with_suffix(".sass_ctrl")
                said = report(found.read_text(), code.read_text() if code.exists() else "")
                faulty += bool(said.faults)
                print(
                    f"{name:48} {found.stem:14} {said.registers:4} registers "
                    f"{said.spilled:5} bytes spilled {said.instructions:6} instructions",
                    *said.faults, sep="\n    ", flush=True,
                )  # fmt: skip
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
