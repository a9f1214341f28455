"""The engines that are measured: Llama-3.1-8B with random weights, or (``tiny``) a shape so small
that every measurement can be tried on a CPU.

All engines keep their compiled programs in one directory. Three kinds of engine are compiled in a
whole run: ``engine`` alone on the card, ``shared`` (two fit beside each other), and the default
model of ``greedy_parity.py``.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as WordTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from jaxllm.bench.server_process import flags_of
from jaxllm.config.engine import EngineConfig
from jaxllm.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
MODEL = Path("configs/models/llama-3.1-8b")  # from ROOT, where parts run: results name it
TINY_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
}
# A token of Llama-3.1-8B is 128 KiB of keys and values: 2,560 blocks are 20 GiB, weights 15 more.
SHARED = {"gpu_memory_utilization": 0.42, "num_gpu_blocks_override": 2561}


def engine(tiny: bool, work: Path) -> dict[str, Any]:
    """Fields of EngineConfig: as shipped, in 0.85 of the card, as vLLM was measured."""
    common = {"load_format": "dummy", "compilation_cache_dir": str(work / "programs")}
    if tiny:
        few = {"max_num_seqs": 8, "max_model_len": 2048, "num_gpu_blocks_override": 257}
        return common | few | {"model": str(_tiny_model(work))}
    sizes = {"max_num_seqs": 256, "max_model_len": 131_072, "gpu_memory_utilization": 0.85}
    return common | sizes | {"model": str(MODEL)}


def shared(tiny: bool, work: Path) -> dict[str, Any]:
    """One of two engines on the card."""
    return engine(tiny, work) | ({} if tiny else SHARED)


def with_tokenizer(tiny: bool, work: Path, tokenizer: Path) -> dict[str, Any]:
    """The engine with a tokenizer of another model, whose end of sequence becomes its own."""
    fields = engine(tiny, work)
    config = json.loads((ROOT / fields["model"] / "config.json").read_text())
    config["eos_token_id"] = Tokenizer.from_dir(str(tokenizer)).eos_token_id
    model = _written(work / "with-tokenizer", config)
    return fields | {"model": str(model), "tokenizer": str(tokenizer)}


def with_words(tiny: bool, work: Path) -> dict[str, Any]:
    """The engine with a tokenizer that has a word for every id, so that every token is text and its
    stream is timed token by token: ids 0 to 255 are bytes, the others numbered words.
    """
    fields = engine(tiny, work)
    config = json.loads((ROOT / fields["model"] / "config.json").read_text())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120w{i}" for i in range(len(alphabet), config["vocab_size"])]  # U+0120: a space
    tokenizer = WordTokenizer(BPE({text: i for i, text in enumerate([*alphabet, *words])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    directory = _written(work / "words", config)
    tokenizer.save(str(directory / "tokenizer.json"))
    return fields | {"tokenizer": str(directory)}


def flags(fields: dict[str, Any]) -> list[str]:
    """For the command line: the model, and what differs from the defaults."""
    return flags_of(EngineConfig(**fields))


def _tiny_model(work: Path) -> Path:
    config = json.loads((ROOT / MODEL / "config.json").read_text()) | TINY_SHAPE
    return _written(work / "tiny-model", config)


def _written(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
