"""Shared by all rooms: strict JAX, one compilation cache per run, a tiny tokenizer, tiny model
configs.
"""

import atexit
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config.env import CACHE_DIR, cache_dir, prepare_interpreter

# Set before anything imports JAX, and inherited by the engine processes that tests start.
HAS_GPU = shutil.which("nvidia-smi") is not None
if not HAS_GPU:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
prepare_interpreter()
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def keep_programs_for_this_run() -> None:
    """Engines find what others of the run have compiled; nothing is left for the next run."""
    own, models = Path(tempfile.mkdtemp(prefix="jaxllm-tests-")), cache_dir() / "models"
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    models.mkdir(parents=True, exist_ok=True)
    (own / "models").symlink_to(models.absolute())
    os.environ[CACHE_DIR] = str(own)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(own / "programs")
    # Thousands of small programs would cost more to find than to compile.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"  # with a bound every write looks at all


if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share their parent's
    keep_programs_for_this_run()

# A shell has what it runs in the background ignore Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Engines of the default model have one size in all rooms, and embeddings: who comes later finds the
# programs that the first has compiled.
DEFAULT_MODEL_SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 128,
}

BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference-python",
        type=Path,
        default=None,
        help="interpreter with torch and transformers; default: the one of .venv-reference",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are left out where there is no GPU: deselected and counted, not skipped."""
    if HAS_GPU:
        return
    absent = [item for item in items if item.get_closest_marker("gpu")]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def write_tiny_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer in ``directory``: ids 0..255 are bytes, 256 is BOS, 257 is EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tiny_hf_config(name: str) -> dict[str, Any]:
    """config.json of a tiny random model; ``name`` is a key of TINY in scripts/parity.py."""
    from scripts.parity import tiny_config

    architecture, arguments = tiny_config(name)
    model_type = architecture.removesuffix("ForCausalLM").lower()
    return (
        {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
        | arguments
        | {
            "architectures": [architecture],
            "model_type": model_type,
            "dtype": "float32",
        }
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and tokenizer of a tiny Llama: enough for ``load_format="dummy"``."""
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("tiny_llama"))
    (directory / "config.json").write_text(json.dumps(tiny_hf_config("llama")))
    return directory
