"""A GGUF file as a Hugging Face directory, for the reference to load the same weights.

    python -m tests.conformance.export_hf OUT_DIR [--gguf FILE] [--dtype bfloat16]

Without a file it is the default model, downloaded for the purpose.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxllm.weights.assembly import numpy_dtype
from jaxllm.weights.default_model import download, extract_gguf
from jaxllm.weights.gguf import GGUFSource
from jaxllm.weights.gguf_tokenizer import tokenizer_files


def export(gguf: Path, out: Path, dtype: str = "bfloat16") -> Path:
    """Write config.json, model.safetensors and the tokenizer; returns ``out``.

    Quantized weights are dequantized and rounded to ``dtype`` once, here; both sides of a
    comparison load the result.
    """
    source = GGUFSource(gguf)
    kind = numpy_dtype(dtype)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(source.read(name), kind) for name in source.names()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = source.config | {"dtype": dtype, "torch_dtype": dtype}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in tokenizer_files(source.header).items():
        (out / name).write_bytes(content)
    return out


def export_default_model(out: Path, dtype: str = "bfloat16") -> Path:
    """The same for the default model, whose GGUF the engine does not keep."""
    with tempfile.TemporaryDirectory() as name:
        gguf = Path(name) / "default.gguf"
        extract_gguf(download(Path(name)), gguf)
        return export(gguf, out, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="default: the default model")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    if options.gguf:
        export(options.gguf, options.out, options.dtype)
    else:
        export_default_model(options.out, options.dtype)


if __name__ == "__main__":
    main()
