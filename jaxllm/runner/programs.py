"""Compiled programs by bucket: all that the serving path runs (a ``jax.jit`` inside a model or a
kernel is part of them).

All are compiled ahead of time from abstract shapes; a call can only reach an existing executable,
so nothing compiles after warm-up.
"""

import json
import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxllm.attention.backend import AttentionBackend
from jaxllm.attention.layers import layer_classes
from jaxllm.attention.variants import functions_of
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.errors import RecompilationError
from jaxllm.models import get_model
from jaxllm.models.params import ModelDef
from jaxllm.parallel.mesh import KV_BLOCK, DeviceMesh
from jaxllm.runner.block_moves import abstract_blocks
from jaxllm.runner.lowering_cache import LoweringCache, is_ours
from jaxllm.runner.lowering_helpers import LoweringHelpers
from jaxllm.runner.memory import MEASURED, ProgramMemory, WorkingMemory
from jaxllm.runner.program_jobs import Job, Key, ProgramJobs
from jaxllm.runner.spares import Program
from jaxllm.sampling.metadata import SamplerMode

logger = logging.getLogger(__name__)

MOST_ROWS_OF_XLA_GEMM = 8
_RECORDED = 64  # XLA keeps so many recordings of a kernel in a CUDA graph; by default 16
_SHAPED_BY_BLOCKS = ("forward", "tapped", "copy", "save", "load")
_TOLD_S = 0.5  # programs that took so long are named in the log


@dataclass(frozen=True, slots=True)
class ProgramSeconds:
    """``lower``: to have its lowered form, from the disk or anew, by a helper or here. ``compile``:
    in its thread, other programs beside it.
    """

    lower: float
    compile: float

    @property
    def total(self) -> float:
        return self.lower + self.compile


_Built = tuple[Program, ProgramSeconds]


class Programs(ProgramJobs):
    """Executables: ``forward(bucket)``, ``sample(num_rows, mode)``, ``embed(num_rows)``, and one of
    each other kind.
    """

    def __init__(
        self,
        plan: EnginePlan,
        model: ModelDef,
        backend: AttentionBackend,
        lowerings: Path | None = None,
        helpers: LoweringHelpers | None = None,
        devices: DeviceMesh | None = None,
    ):
        """``lowerings``: a directory for what would have to be traced and lowered again.
        ``helpers``: who does that beside this process; they write into the same directory.
        ``devices``: default one.

        Raises:
            ConfigError: there are not as many devices as the plan's model is shared out over.
        """
        super().__init__(plan, model, backend, kernel_platform())
        self.devices = devices or DeviceMesh(plan.model.shards)
        # A model or backend from elsewhere may change without the cache's key knowing of it.
        layers = layer_classes(plan.model)
        kept = is_ours(type(backend), get_model(plan.model.architecture), *layers)
        kept = kept and is_ours(*functions_of(plan.model))
        self._lowerings = lowerings if kept else None
        self._helpers = helpers if kept else None
        self._draft = plan
        self._compiled: dict[Key, Program] = {}
        self.seconds: dict[str, ProgramSeconds] = {}  # by name; of what was compiled last
        self.compile_seconds = 0.0

    @property
    def host_block(self) -> jax.ShapeDtypeStruct:
        """One block of all devices together, as the host's memory and files hold it."""
        return self.devices.whole(abstract_blocks(self._kv())[0], KV_BLOCK)

    def forward(self, bucket: BatchBucket) -> Program:
        """Raises RecompilationError for a bucket that was not compiled."""
        return self._find(("forward", bucket))

    def sample(self, num_rows: int, mode: SamplerMode) -> Program:
        """One of ``modes(num_rows)``."""
        return self._find(("sample", num_rows, mode))

    def mode_for(self, num_rows: int, mode: SamplerMode) -> SamplerMode:
        """The sampler that serves rows of ``mode``: greedy rows may go with random ones."""
        if mode is SamplerMode.GREEDY and ("sample", num_rows, mode) not in self._compiled:
            return SamplerMode.RANDOM
        return mode

    @property
    def score(self) -> Program:
        """Of what mixed steps leave; ``hidden.scored`` tokens at a time."""
        return self._find(("score",))

    def embed(self, num_rows: int) -> Program:
        """Of what mixed steps of so many rows leave. Only where the plan has embeddings."""
        return self._find(("embed", num_rows))

    def tapped(self, bucket: BatchBucket) -> Program:
        """``forward`` with taps. Mixed buckets only, and only where the plan has taps."""
        return self._find(("tapped", bucket))

    @property
    def edit(self) -> Program:
        """Of what rows change. Only where the plan has taps."""
        return self._find(("edit",))

    def move(self, kind: str) -> Program:
        """Of blocks: "copy", and where the plan has blocks on the host "save" and "load"."""
        return self._find((kind,))

    @property
    def recount(self) -> Program:
        return self._find(("recount",))

    def _find(self, key: Key) -> Program:
        try:
            return self._compiled[key]
        except KeyError:
            known = ", ".join(str(bucket) for bucket in self.plan.buckets)
            raise RecompilationError(
                f"No program was compiled for {' '.join(map(str, key))}; buckets: {known}."
            ) from None

    def __len__(self) -> int:
        return len(self._compiled)

    def measure(self, *, threads: int = 4) -> WorkingMemory:
        """What the programs take, found before it is known how many KV blocks fit. The number of
        blocks shapes few programs, and not their temporaries: so the largest of each kind
        is compiled for the plan's number, whatever that is, and all the others for good.
        """
        largest = {bucket.kind: bucket for bucket in sorted(self.plan.buckets)}
        probes = [self._forward_job(bucket) for bucket in sorted(largest.values(), reverse=True)]
        if self.plan.taps:
            probes.append(self._tapped_job(largest[BatchKind.MIXED]))
        self._compile([*probes, *self._fixed_jobs(), *self._move_jobs()], threads, progress=False)
        return self.working_memory()

    def settle(self, plan: EnginePlan) -> None:
        """Take the plan that knows how many blocks fit. Its tables stay as wide as before, even
        where it holds no row of that length.
        """
        if plan.num_blocks != self.plan.num_blocks:
            self._compiled = {
                key: found
                for key, found in self._compiled.items()
                if key[0] not in _SHAPED_BY_BLOCKS
            }
        self.plan = plan

    def compile(self, *, threads: int = 4, progress: bool = True) -> None:
        """Compile everything the plan's buckets need and that is not there yet, in parallel."""
        missing = [job for job in self.jobs() if job.key not in self._compiled]
        try:
            self._compile(missing, threads, progress=progress)
        finally:
            self.close()
        logger.info("%d programs ready in %.1f s", len(self), self.compile_seconds)
        told = {name: found for name, found in self.seconds.items() if found.total >= _TOLD_S}
        if told:
            rounded = {
                name: [round(found.lower, 2), round(found.compile, 2)]
                for name, found in sorted(told.items(), key=lambda item: -item[1].total)
            }
            logger.info("Seconds of lowering and compiling: %s", json.dumps(rounded))

    def close(self) -> None:
        """End the helpers; whatever is still to be lowered is lowered here."""
        if self._helpers is not None:
            self._helpers.close()

    def working_memory(self) -> WorkingMemory:
        """Of every program there is, those with the largest temporaries first."""
        runs = {"score": self.hidden.pieces}  # of a step at most
        found = [
            _memory_of(key, program, runs.get(key[0], 1)) for key, program in self._compiled.items()
        ]
        found.sort(key=lambda program: program.temporary_bytes, reverse=True)
        return WorkingMemory(tuple(found), MEASURED)

    def _compile(self, jobs: list[Job], threads: int, *, progress: bool) -> None:
        started = time.monotonic()
        jobs = [self._spread(job) for job in jobs]
        shaped_by = (_without_host_settings(self.plan), self.backend.name, self.model.names)
        cache = LoweringCache(self._lowerings, *shaped_by, placed=self.devices.sharding())
        futures: dict[str, Future[_Built]] = {}
        by_name = {job.name: job for job in jobs}
        # Tracing is Python and gains nothing from threads; XLA releases the GIL while it compiles.
        with ThreadPoolExecutor(threads) as pool:

            def found(name: str, helped: float = 0.0) -> None:
                futures[name] = pool.submit(_build, by_name[name], cache, helped)

            with closing(self._to_lower_here(jobs, cache, found)) as names:
                for name in names:
                    futures[name] = pool.submit(
                        _compile, by_name[name], *_lower(by_name[name], cache)
                    )
            for job in tqdm(
                jobs, desc="Compiling", unit="program", disable=None if progress else True
            ):
                self._compiled[job.key], self.seconds[job.name] = futures[job.name].result()
        self.compile_seconds += time.monotonic() - started

    def _spread(self, job: Job) -> Job:
        """A program of one device as one of all."""
        devices = self.devices
        function = devices.spread(job.function, job.given, job.made)
        return replace(job, function=function, args=devices.whole(job.args, job.given))

    def _to_lower_here(
        self, jobs: list[Job], cache: LoweringCache, found: Callable[..., None]
    ) -> Generator[str]:
        """Names of jobs. ``found`` is called for those whose lowered form is on the disk, or should
        be, since a helper wrote it.
        """
        if self._helpers is None:
            yield from (job.name for job in jobs)
            return
        wanted: list[tuple[str, Path]] = []
        for job in jobs:
            path = cache.path(job.name, job.args)
            if path is None or path.is_file():
                found(job.name)
            else:
                wanted.append((job.name, path))
        plan = replace(self._draft, num_blocks=self.plan.num_blocks)
        yield from self._helpers.share(plan, wanted, found)


def kernel_platform() -> str:
    """The device that programs are compiled for, as pallas_kernels names it."""
    device: Any = jax.devices()[0]
    hopper = str(getattr(device, "compute_capability", "")) == "9.0"
    return "sm_90" if hopper else str(device.platform)


_Lowered = tuple[jax.stages.Lowered, tuple[jax.ShapeDtypeStruct, ...], float]


def _build(job: Job, cache: LoweringCache, helped: float) -> _Built:
    lowered, overwrites, seconds = _lower(job, cache)
    return _compile(job, lowered, overwrites, seconds + helped)


def _lower(job: Job, cache: LoweringCache) -> _Lowered:
    """What ``_compile`` takes; the last are the seconds it took."""
    begun = time.monotonic()
    found = cache.lower(job.name, job.function, job.args, job.donated, job.overwrites_from)
    return (*found, time.monotonic() - begun)


def _compile(
    job: Job,
    lowered: jax.stages.Lowered,
    overwrites: tuple[jax.ShapeDtypeStruct, ...],
    seconds: float,
) -> _Built:
    begun = time.monotonic()
    program = Program(job.key[0], lowered.compile(_compiler_options(job.key)), overwrites)
    return program, ProgramSeconds(seconds, time.monotonic() - begun)


def _without_host_settings(plan: EnginePlan) -> EnginePlan:
    """What programs depend on. An engine that shares prefixes or swaps runs those of one that does
    not; what ends an answer comes with the request; the number of blocks is seen in the arguments
    of those that it shapes; why there is a backend changes nothing.
    """
    return replace(
        plan,
        model=replace(plan.model, eos_token_ids=(), bos_token_id=None),
        num_blocks=0,
        prefix_caching=True,
        prefix_cache_scope="key",
        host_blocks=0,
        offloading=False,
        kv_files=False,
        jump_forward=True,
        attention_reason="",
    )


def _memory_of(key: Key, program: Program, runs: int) -> ProgramMemory:
    stats = program.executable.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    outputs += sum(spec.size * spec.dtype.itemsize for spec in program.overwrites)
    if key[0] == "load":  # what comes from the host has nowhere else to be counted
        outputs += stats.argument_size_in_bytes - stats.alias_size_in_bytes
    shape = " ".join(map(str, key[1:]))
    return ProgramMemory(key[0], shape, stats.temp_size_in_bytes, runs * outputs)


def _compiler_options(key: Key) -> dict[str, bool | int]:
    """On a GPU, XLA reads a slice in place by handing its address on, which fails at run time when
    that is not aligned: a gather of one row from an array of bytes is enough.

    For products of few rows XLA's own kernels are the fastest, for others the vendor's library is;
    left to choose, XLA takes its own too often (figures in NOTES.md).

    A kernel whose arrays lie where they lay in one of its last recordings is not recorded anew.
    """
    if jax.default_backend() != "gpu":
        return {}
    options: dict[str, bool | int] = {
        "xla_gpu_enable_dynamic_slice_fusion": False,
        "xla_cmd_buffer_trace_cache_size": _RECORDED,
    }
    buckets = [part for part in key if isinstance(part, BatchBucket)]
    if any(bucket.num_tokens > MOST_ROWS_OF_XLA_GEMM for bucket in buckets):
        options |= {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}
    return options
