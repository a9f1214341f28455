"""Builds an engine from its configuration: files, plan, parameters, programs, core. Imports JAX."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.kv_cache import most_padded
from jaxllm.attention.select import cache_head_dims, select_backend
from jaxllm.attention.variants import choose_attention
from jaxllm.config.engine import EngineConfig
from jaxllm.config.env import cache_dir, cpu_count, is_set, prepare_accelerator
from jaxllm.config.model import ModelConfig
from jaxllm.config.plan import EnginePlan, page_dtype
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.engine.latency_target import LatencyTarget
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.grammar.compiler import GrammarCompiler
from jaxllm.grammar.ll_tokenizer import load_ll_tokenizer
from jaxllm.journal.core import JournaledCore, journal_of
from jaxllm.kv_files.store import BlockStore
from jaxllm.messages import CacheInfo, ModelInfo
from jaxllm.models import get_model
from jaxllm.models.params import ModelDef, Params, model_def
from jaxllm.parallel.mesh import KV_BLOCK, DeviceMesh, param_specs
from jaxllm.runner.compile_counter import compile_counter
from jaxllm.runner.host_pool import lock_memory
from jaxllm.runner.lowering_cache import jax_settings
from jaxllm.runner.lowering_helpers import LoweringHelpers, LoweringTarget
from jaxllm.runner.memory import (
    GIB,
    Device,
    MemoryPlan,
    estimated_memory,
    memory_plan,
    this_device,
)
from jaxllm.runner.model_runner import ModelRunner
from jaxllm.runner.planning import check_plan, draft_plan, fit_plan, needs_measuring
from jaxllm.runner.programs import Programs, kernel_platform
from jaxllm.weights.checkpoint import load_converted
from jaxllm.weights.convert import model_class, open_source
from jaxllm.weights.json_file import read_json_object
from jaxllm.weights.loader import arrange, dummy_params, load_params
from jaxllm.weights.model_sources import check_source
from jaxllm.weights.resolve import ModelFiles, resolve_model
from jaxllm.weights.sources import TensorSource
from jaxllm.worker.block_files import open_block_files
from jaxllm.worker.generation_config import GenerationConfig, read_generation_config
from pallas_kernels.norm.add_rms_norm_sm90 import refuses_add_rms_norm_sm90

logger = logging.getLogger(__name__)

_MAX_PROGRAM_BYTES = 8 * 2**30  # of compiled programs on disk; what was of use last stays


@dataclass(frozen=True)
class OpenedModel:
    """What is known of a model before its weights are read."""

    files: ModelFiles
    source: TensorSource | None  # of tensors; None: a converted checkpoint, or dummy weights
    model: ModelDef
    dtype: str
    generation: GenerationConfig


@dataclass(frozen=True)
class BuiltEngine:
    core: EngineCore
    info: ModelInfo
    plan: EnginePlan
    summary: dict[str, str | int | float]


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Everything up to "ready": all programs compiled, all memory allocated.

    Raises:
        ConfigError: and its subclasses, for anything wrong with the model, the settings, or the
            files and directories they name.
    """
    try:
        return _build_engine(config)
    except OSError as error:  # no permission, no space, a cache directory that cannot be made
        where = f" {error.filename}" if error.filename else ""
        raise ConfigError(f"Cannot read or write{where}: {error.strerror or error}.") from error


def _build_engine(config: EngineConfig) -> BuiltEngine:
    started = time.monotonic()
    configure_jax(config)
    compilations = compile_counter()
    opened = open_model(config)
    if recommended := str(opened.generation):
        logger.info("generation_config.json, where requests leave it open: %s", recommended)
    device = this_device(config.tensor_parallel_size)
    programs = draft_programs(config, opened, device)
    logger.info("Attention backend: %s", programs.plan.attention_reason)
    with closing(programs), ThreadPoolExecutor(1) as beside:
        memory = size_programs(config, programs, device)
        on_host = 0 if device.platform == "cpu" else programs.plan.host_blocks
        locking = beside.submit(lock_memory, on_host, programs.host_block, programs.devices)
        loading = time.monotonic()
        params = load_weights(config, opened, programs.devices)
        load_seconds = time.monotonic() - loading
        compile_programs(programs, memory)
        locking.result()
    plan = programs.plan
    info = _model_info(config, opened, plan)
    with ExitStack() as unless_started:
        files, cache_key = open_block_files(config, opened.files, plan)
        if files is not None:
            unless_started.callback(files.close)
        plan = replace(plan, kv_files=files is not None)
        journal = journal_of(config, plan, cache_key)
        if journal is not None:
            unless_started.callback(journal.close)
        runner = _start_runner(params, programs, memory, _grammars(info), files)
        unless_started.pop_all()
    core = (EngineCore if journal is None else partial(JournaledCore, journal=journal))(
        Scheduler(plan, config.scheduling, cache_key=cache_key),
        runner,
        async_scheduling=config.async_scheduling,
        latency_target=_latency_target(config, plan),
        compilations=compilations,
        files=files,
        keep=None if files is None else runner.keep,
    )
    summary = _summary(programs, memory) | {
        "load_seconds": round(load_seconds, 2),
        "start_seconds": round(time.monotonic() - started, 2),
    }
    return BuiltEngine(core, info, plan, summary)


def _latency_target(config: EngineConfig, plan: EnginePlan) -> LatencyTarget | None:
    if config.target_itl_ms is None:
        return None
    return LatencyTarget(plan.buckets, config.target_itl_ms / 1000)


def configure_jax(config: EngineConfig, *, preallocate: bool = True) -> None:
    """Compiled programs are kept on disk, whatever their size: the next start only loads them. The
    bound also makes JAX lock the directory, which engines may share. What the user has set of JAX's
    own settings holds.
    """
    prepare_accelerator(
        config.gpu_memory_utilization,
        preallocate=preallocate,
        host_gib=(config.swap_space or 0.0) + config.kv_offloading_size,
    )
    jax.config.update("jax_compilation_cache_dir", str(_program_dir(config)))
    for setting, value in (
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
        ("jax_compilation_cache_max_size", _MAX_PROGRAM_BYTES),
    ):
        if not is_set(setting):
            jax.config.update(setting, value)


def _program_dir(config: EngineConfig) -> Path:
    return Path(config.compilation_cache_dir or cache_dir() / "programs")


def open_model(config: EngineConfig) -> OpenedModel:
    """Reads what describes the model, and the headers of its files."""
    allowed = config.allowed_model_sources
    if config.tokenizer is not None:
        check_source(config.tokenizer, allowed)
    files = resolve_model(
        config.model, revision=config.revision, offline=config.offline, allowed_sources=allowed
    )
    recommends = config.generation_config == "auto"
    generation = read_generation_config(files.tokenizer_dir, recommends=recommends)
    source, model_config = _read_model(config, files, generation)
    chosen = choose_attention(config.attention, config.attention_params, model_config)
    model_config = replace(model_config, attention=chosen).part(config.tensor_parallel_size)
    dtype = _dtype(config, model_config)
    platform = kernel_platform()
    refusal = refuses_add_rms_norm_sm90(model_config.hidden_size, dtype, platform)
    if platform == "sm_90" and refusal is not None:
        logger.warning("Plain XLA adds and norms the residual stream: %s", refusal)
    model = model_def(model_config, dtype, platform)
    return OpenedModel(files, source, model, dtype, generation)


def draft_programs(config: EngineConfig, opened: OpenedModel, device: Device) -> Programs:
    """The programs of this machine's device, none of them compiled; their plan is a draft."""
    target = _attention_target(config, opened.dtype)
    backend, reason = select_backend(AttentionSpec.all_of(opened.model.config), target)
    head_dims = cache_head_dims(opened.model.config, backend)
    if head_dims:
        own, stored = most_padded(opened.model.config, head_dims)
        more = 100 * (stored - own) // own
        logger.warning("KV pages hold heads of %d as %d: %d%% more memory", own, stored, more)
    attention = (backend.name, reason)
    draft = draft_plan(config, opened.model, opened.dtype, device.platform, attention, head_dims)
    lowerings = _program_dir(config) / "lowered"
    devices = DeviceMesh(config.tensor_parallel_size)
    helpers = _helpers(target, device) if devices.shards == 1 else None
    return Programs(draft, opened.model, backend, lowerings, helpers, devices)


def _helpers(target: AttentionTarget, device: Device) -> LoweringHelpers | None:
    """On a CPU they would take the cores that compile; and they lower for one device alone."""
    if device.platform == "cpu" or cpu_count() < 4:
        return None
    platforms = kernel_platform(), jax.export.default_export_platform()
    return LoweringHelpers(LoweringTarget(target, *platforms, jax_settings()), cpu_count() // 2)


def size_programs(config: EngineConfig, programs: Programs, device: Device) -> MemoryPlan:
    """Give the programs a plan that knows how many KV blocks fit. Call it before weights are
    loaded: scratch memory of the compiler among them would leave holes that the cache cannot use.

    Raises:
        OutOfMemoryError: there is no room.
    """
    draft, model = programs.plan, programs.model
    if needs_measuring(config, draft, model, device):
        working = programs.measure(threads=cpu_count())
        if not working.worst.temporary_bytes:  # no program runs without: the compiler is silent
            working = estimated_memory(draft)
    else:
        working = estimated_memory(draft)
    memory = memory_plan(draft, model, device, working)
    plan = fit_plan(config, draft, memory)
    if plan.max_model_len < draft.max_model_len:
        asked, fits = draft.max_model_len, plan.max_model_len
        logger.warning("max_model_len is %d, not %d: the KV cache holds no more", fits, asked)
    programs.settle(plan)
    return memory


def compile_programs(programs: Programs, memory: MemoryPlan) -> None:
    """Raises OutOfMemoryError if they need more than ``memory`` says."""
    programs.compile(threads=cpu_count())
    check_plan(programs.plan, memory, programs.working_memory())


def _grammars(info: ModelInfo) -> GrammarCompiler:
    vocabulary = (info.tokenizer_dir, info.vocab_size, info.eos_token_ids)
    return GrammarCompiler(lambda: load_ll_tokenizer(*vocabulary))


def _start_runner(
    params: Params,
    programs: Programs,
    memory: MemoryPlan,
    grammars: GrammarCompiler,
    files: BlockStore | None,
) -> ModelRunner:
    """Allocates the cache. What steps will need is allocated once too, in one piece, and given back
    at once: so that it is known now that they will find it.
    """
    try:
        runner = ModelRunner(programs.plan, params, programs, grammars, files)
        if memory.device.platform != "cpu":
            programs.devices.zeros(
                jax.ShapeDtypeStruct((memory.working.total,), jnp.uint8), KV_BLOCK
            ).block_until_ready()
            runner.warm_up()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(
            f"The device has no room for {programs.plan.num_blocks} KV-cache blocks and "
            f"{memory.working.total / GIB:.2f} GiB of working memory in one piece beside the "
            "weights: something else uses it. Lower --gpu-memory-utilization, or name a size with "
            "--kv-cache-memory-bytes."
        ) from error
    return runner


def _read_model(
    config: EngineConfig, files: ModelFiles, generation: GenerationConfig
) -> tuple[TensorSource | None, ModelConfig]:
    """Where the tensors come from (None: a converted checkpoint, or dummy weights), and the
    shapes. Chat models often end turns only by an id that generation_config.json adds.
    """
    source: TensorSource | None = None
    if files.kind == "gguf" or (files.kind == "hf" and config.load_format != "dummy"):
        source, _ = open_source(files.path)
        hf = source.config
    else:
        hf = read_json_object(files.path / "config.json")
    model = model_class(hf, files.name).config_from_hf(hf)
    ends = dict.fromkeys((*model.eos_token_ids, *generation.eos_token_ids))
    return source, replace(model, eos_token_ids=tuple(ends))


def _dtype(config: EngineConfig, model: ModelConfig) -> str:
    """ "auto" is what the checkpoint was saved in, but never float32: that is asked for by name."""
    if config.dtype != "auto":
        return config.dtype
    return model.dtype if model.dtype in ("bfloat16", "float16") else "bfloat16"


def _attention_target(config: EngineConfig, dtype: str) -> AttentionTarget:
    device: Any = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    where = (jax.default_backend(), capability, config.block_size, dtype)
    pages = page_dtype(config.kv_cache_dtype, dtype)
    return AttentionTarget(*where, device_kind=device.device_kind, page_dtype=pages)


def load_weights(config: EngineConfig, opened: OpenedModel, devices: DeviceMesh) -> Params:
    """The model's parameters, in its order, shared out. Raises ConfigError."""
    files, source, model = opened.files, opened.source, opened.model
    placed = devices.whole(model.specs, param_specs(model.cuts))
    spec = dict(zip(model.names, placed, strict=True))
    if config.load_format == "dummy":
        params = dummy_params(spec, config.seed)
    elif source is None:
        params = load_converted(files.path, spec)
    else:
        cls = get_model(model.config.architecture)
        rules = cls.weight_rules(model.config)
        params = load_params(spec, rules, source, ignore=cls.ignored(model.config))
    arrange(params, model.fused, devices)
    return model.flatten(params)


def _model_info(config: EngineConfig, opened: OpenedModel, plan: EnginePlan) -> ModelInfo:
    return ModelInfo(
        model=opened.files.name,
        tokenizer_dir=_tokenizer_dir(config, opened.files),
        max_model_len=plan.max_model_len,
        vocab_size=plan.model.vocab_size,
        eos_token_ids=plan.model.eos_token_ids,
        bos_token_id=plan.model.bos_token_id,
        attention_params=plan.attention_params,
        embedding_size=plan.model.hidden_size if plan.embeddings else 0,
        taps=plan.tap_shapes,
        sampling_defaults=opened.generation.sampling,
        max_new_tokens=opened.generation.max_new_tokens,
        cache=CacheInfo(
            block_size=plan.block_size,
            cache_dtype=plan.kv_cache_dtype,
            num_gpu_blocks=plan.num_blocks - 1,
            num_cpu_blocks=plan.host_blocks,
            enable_prefix_caching=plan.prefix_caching,
            gpu_memory_utilization=config.gpu_memory_utilization,
        ),
    )


def _tokenizer_dir(config: EngineConfig, files: ModelFiles) -> str | None:
    """Dummy weights may come from a config.json with no tokenizer beside it: then only ids are
    served.
    """
    if config.tokenizer is not None:
        return config.tokenizer
    if config.load_format == "dummy" and not (files.tokenizer_dir / "tokenizer.json").is_file():
        return None
    return str(files.tokenizer_dir)


def _summary(programs: Programs, memory: MemoryPlan) -> dict[str, str | int | float]:
    device: Any = jax.devices()[0]
    plan = programs.plan
    return {
        "device": device.device_kind,
        "devices": programs.devices.shards,
        "dtype": plan.dtype,
        "kv_cache_dtype": plan.page_dtype,
        "attention": plan.attention_reason,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "kv_blocks": plan.num_blocks,
        "kv_tokens": plan.kv_tokens,
        "programs": len(programs),
        "weight_bytes": memory.weights,
        "temp_bytes": programs.working_memory().worst.temporary_bytes,
        "compile_seconds": round(programs.compile_seconds, 2),
    }
