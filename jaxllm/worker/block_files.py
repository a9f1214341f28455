"""Opens the directory that KV blocks are kept in, and tells which of its files are this model's."""

import inspect
import logging
import secrets
from hashlib import blake2b
from pathlib import Path

import jaxllm
from jaxllm.attention.layers import layer_files
from jaxllm.attention.variants import functions_of
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import EnginePlan
from jaxllm.kv_files.directory import BlockDirectory, DirectoryInUseError
from jaxllm.kv_files.store import BlockStore
from jaxllm.runner.memory import GIB
from jaxllm.weights.resolve import ModelFiles

logger = logging.getLogger(__name__)

KEY_BYTES = 32


def open_block_files(
    config: EngineConfig, files: ModelFiles, plan: EnginePlan
) -> tuple[BlockStore | None, bytes]:
    """The store, if one is asked for and can be had, and the key for the hashes of blocks: with
    files it must be the same after a restart, and another for another model.
    """
    if not plan.kv_files or config.kv_offloading_dir is None:
        return None, secrets.token_bytes(KEY_BYTES)
    path = Path(config.kv_offloading_dir)
    try:
        directory = BlockDirectory(path, int(config.kv_offloading_dir_size * GIB))
    except DirectoryInUseError:
        logger.warning("KV blocks are not kept in %s: another engine does so.", path)
        return None, secrets.token_bytes(KEY_BYTES)
    except OSError as error:
        logger.warning("KV blocks are not kept in %s: %s.", path, error.strerror or error)
        return None, secrets.token_bytes(KEY_BYTES)
    identity = _identity(config, files, plan)
    logger.info("%d KV blocks are in %s.", len(directory.names()), path)
    key = blake2b(identity.encode(), key=directory.key, digest_size=KEY_BYTES).digest()
    return BlockStore(directory, identity, config.kv_offloading_dir_timeout), key


def _identity(config: EngineConfig, files: ModelFiles, plan: EnginePlan) -> str:
    """A digest of all that keys and values depend on beside tokens. Weights count by the names,
    sizes and times of their files: to read them all would take as long as to load them.
    """
    parts = [jaxllm.__version__, repr(plan.model), plan.kv_identity]
    parts += [str(plan.block_size), config.load_format, str(config.seed)]
    root, blocks = files.path.absolute(), Path(config.kv_offloading_dir or "").absolute()
    kept_inside = {blocks} if root in blocks.parents else set[Path]()
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.is_file() and kept_inside.isdisjoint(path.parents):
            status = path.stat()
            parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    # A user's own may change between two starts.
    code = [Path(inspect.getsourcefile(function) or "") for function in functions_of(plan.model)]
    parts += [file.read_text(encoding="utf-8") for file in (*code, *layer_files(plan.model))]
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
