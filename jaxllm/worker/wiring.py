"""Builds an engine from its configuration: files, plan, parameters, programs, core. Imports JAX."""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.select import select_backend
from jaxllm.config.engine import EngineConfig
from jaxllm.config.env import cache_dir, cpu_count, prepare_accelerator
from jaxllm.config.model import ModelConfig
from jaxllm.config.plan import EnginePlan
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import ConfigError
from jaxllm.messages import ModelInfo
from jaxllm.models import get_model
from jaxllm.models.hf_config import HFConfig
from jaxllm.models.params import ModelDef, Params, model_def
from jaxllm.runner.model_runner import ModelRunner
from jaxllm.runner.planning import make_plan
from jaxllm.runner.programs import Programs
from jaxllm.weights.checkpoint import load_converted
from jaxllm.weights.convert import architecture_of, open_source
from jaxllm.weights.json_file import read_json_object
from jaxllm.weights.loader import dummy_params, load_params
from jaxllm.weights.resolve import ModelFiles, resolve_model
from jaxllm.weights.sources import TensorSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    core: EngineCore
    info: ModelInfo
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
    _configure_jax(config)
    files = resolve_model(config.model, revision=config.revision, offline=config.offline)
    source, model_config = _read_model(config, files)
    dtype = _dtype(config, model_config)
    model = model_def(model_config, dtype)
    target = _attention_target(config, dtype)
    backend, reason = select_backend(AttentionSpec.all_of(model_config), target)
    logger.info("Attention backend: %s", reason)
    plan = make_plan(config, model, dtype, backend.name, reason)
    programs = Programs(plan, model, backend)
    loading = time.monotonic()
    params = _load_params(config, files, source, model)
    load_seconds = time.monotonic() - loading
    programs.compile(threads=cpu_count())
    core = EngineCore(
        Scheduler(plan),
        ModelRunner(plan, params, programs),
        async_scheduling=config.async_scheduling,
    )
    summary = _summary(plan, programs) | {
        "load_seconds": round(load_seconds, 2),
        "start_seconds": round(time.monotonic() - started, 2),
    }
    return BuiltEngine(core, _model_info(config, files, plan), summary)


def _configure_jax(config: EngineConfig) -> None:
    """Compiled programs are kept on disk, whatever their size: the next start only loads them."""
    prepare_accelerator(config.gpu_memory_utilization)
    directory = config.compilation_cache_dir or str(cache_dir() / "programs")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _read_model(config: EngineConfig, files: ModelFiles) -> tuple[TensorSource | None, ModelConfig]:
    """Where the tensors come from (None: a converted checkpoint, or dummy weights), and the
    shapes.
    """
    source: TensorSource | None = None
    if files.kind == "gguf" or (files.kind == "hf" and config.load_format != "dummy"):
        source, _ = open_source(files.path)
        hf = source.config
    else:
        hf = read_json_object(files.path / "config.json")
    model = get_model(architecture_of(hf, files.name)).config_from_hf(hf)
    return source, replace(model, eos_token_ids=_eos_token_ids(files, model))


def _eos_token_ids(files: ModelFiles, model: ModelConfig) -> tuple[int, ...]:
    """Those of config.json and of generation_config.json: chat models often end turns only by the
    latter.
    """
    path = files.tokenizer_dir / "generation_config.json"
    extra: tuple[int, ...] = ()
    if path.is_file():
        extra = HFConfig(read_json_object(path)).token_ids("eos_token_id")
    return tuple(dict.fromkeys((*model.eos_token_ids, *extra)))


def _dtype(config: EngineConfig, model: ModelConfig) -> str:
    """ "auto" is what the checkpoint was saved in, but never float32: that is asked for by name."""
    if config.dtype != "auto":
        return config.dtype
    return model.dtype if model.dtype in ("bfloat16", "float16") else "bfloat16"


def _attention_target(config: EngineConfig, dtype: str) -> AttentionTarget:
    device: Any = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return AttentionTarget(jax.default_backend(), capability, config.block_size, dtype)


def _load_params(
    config: EngineConfig, files: ModelFiles, source: TensorSource | None, model: ModelDef
) -> Params:
    spec = dict(zip(model.names, model.specs, strict=True))
    if config.load_format == "dummy":
        return model.flatten(dummy_params(spec, config.seed))
    if source is None:
        return model.flatten(load_converted(files.path, spec))
    cls = get_model(model.config.architecture)
    rules = cls.weight_rules(model.config)
    return model.flatten(load_params(spec, rules, source, ignore=cls.ignored(model.config)))


def _model_info(config: EngineConfig, files: ModelFiles, plan: EnginePlan) -> ModelInfo:
    return ModelInfo(
        model=files.name,
        tokenizer_dir=_tokenizer_dir(config, files),
        max_model_len=plan.max_model_len,
        vocab_size=plan.model.vocab_size,
        eos_token_ids=plan.model.eos_token_ids,
        bos_token_id=plan.model.bos_token_id,
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


def _summary(plan: EnginePlan, programs: Programs) -> dict[str, str | int | float]:
    device: Any = jax.devices()[0]
    return {
        "device": device.device_kind,
        "dtype": plan.dtype,
        "attention": plan.attention_reason,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "kv_blocks": plan.num_blocks,
        "kv_tokens": (plan.num_blocks - 1) * plan.block_size,
        "programs": len(programs),
        "temp_bytes": programs.temp_bytes(),
        "compile_seconds": round(programs.compile_seconds, 2),
    }
