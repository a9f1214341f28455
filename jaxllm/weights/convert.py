"""Conversion: a Hugging Face directory or a GGUF file becomes a converted checkpoint.

``main`` is the command line behind scripts/convert_checkpoint.py and ``python -m
jaxllm.weights.convert``, which the default model uses. Imports JAX through the models.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import jax

from jaxllm.errors import CheckpointError, JaxLLMError
from jaxllm.models import get_model
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.params import param_spec
from jaxllm.weights.assembly import FLOAT_DTYPES, Assembly
from jaxllm.weights.checkpoint import write_checkpoint
from jaxllm.weights.gguf import GGUFSource
from jaxllm.weights.gguf_tokenizer import tokenizer_files
from jaxllm.weights.manifest import MANIFEST_FILE
from jaxllm.weights.safetensors import SafetensorsSource
from jaxllm.weights.sources import TensorSource

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MAX_TOKENIZER_BYTES = 256 << 20


def open_source(src: Path) -> tuple[TensorSource, dict[str, bytes]]:
    """The tensors of ``src`` and the small files that travel with them. Raises CheckpointError."""
    if src.is_dir():
        if (src / MANIFEST_FILE).exists():
            raise CheckpointError(f"{src} is a converted checkpoint already")
        return SafetensorsSource(src), _tokenizer_files(src)
    if src.is_file() and src.suffix == ".gguf":
        source = GGUFSource(src)
        return source, tokenizer_files(source.header)
    raise CheckpointError(f"{src} is neither a model directory nor a .gguf file")


def _tokenizer_files(directory: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        path = directory / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_TOKENIZER_BYTES} bytes")
        files[name] = path.read_bytes()
    return files


def model_class(config: dict[str, Any], what: str) -> type[DecoderLM]:
    """The class that config.json names.

    Raises:
        CheckpointError: it names none or several, or says that its weights are quantised.
        ConfigError: there is no such class.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{what}: config.json must name one architecture, not {names!r}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{what}: config.json says that its weights are quantised ({method}), which is not "
            "read. Take the checkpoint in 16 bits that it was made from, or a GGUF file of it"
        )
    return get_model(names[0])


def convert(src: str, dst: Path, *, dtype: str = "auto", force: bool = False) -> None:
    """Convert the model in ``src`` into the directory ``dst``.

    ``dtype`` "auto" keeps what the checkpoint says. ``dst`` must not exist unless ``force``; it
    appears whole or not at all. Raises CheckpointError or another ConfigError.
    """
    if dst.exists() and not force:
        raise CheckpointError(f"{dst} exists; choose another place or use --force")
    source, files = open_source(Path(src))
    cls = model_class(source.config, src)
    config = cls.config_from_hf(source.config)
    saved = config.dtype if dtype == "auto" else dtype
    if saved not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype {saved!r} is not supported; use {', '.join(FLOAT_DTYPES)}")
    rules, ignored = cls.weight_rules(config), cls.ignored(config)
    assembly = Assembly(param_spec(config, saved), rules, source, ignored)
    try:
        dst.absolute().parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dst.absolute().parent).free
        if free < assembly.total_bytes:
            raise CheckpointError(
                f"{assembly.total_bytes:,} bytes are needed in {dst.absolute().parent}, where "
                f"{free:,} are free; free some, or choose another place"
            )
        hf_config = source.config | {"dtype": saved, "torch_dtype": saved}
        write_checkpoint(dst, assembly, hf_config, files, force=force)
    except OSError as error:
        raise CheckpointError(f"cannot write {dst}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Convert a model into a checked checkpoint.")
    parser.add_argument("src", help="model directory (config.json, *.safetensors) or .gguf file")
    parser.add_argument("dst", type=Path, help="directory to make")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32")
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # leave an accelerator to those who compute
    try:
        convert(args.src, args.dst, dtype=args.dtype, force=args.force)
    except JaxLLMError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {args.dst}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
