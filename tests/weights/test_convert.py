"""Conversion end to end, on the command line: directories and GGUF files, bad input, SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxllm.errors import CheckpointError
from jaxllm.models import get_model
from jaxllm.models.params import param_spec
from jaxllm.weights.checkpoint import load_converted
from jaxllm.weights.convert import convert, main
from jaxllm.weights.loader import load_params
from jaxllm.weights.manifest import verify_manifest
from jaxllm.weights.safetensors import SafetensorsSource
from tests.weights.conftest import CONFIG, WriteGGUF


def load(directory: Path, dtype: str) -> dict[str, jax.Array]:
    config = json.loads((directory / "config.json").read_text())
    cls = get_model("LlamaForCausalLM")
    return load_converted(directory, param_spec(cls.config_from_hf(config), dtype))


@pytest.mark.parametrize(("dtype", "saved"), [("auto", "bfloat16"), ("float32", "float32")])
def test_directory(hf_dir: Path, tmp_path: Path, dtype: str, saved: str) -> None:
    assert main([str(hf_dir), str(tmp_path / "ck"), "--dtype", dtype]) == 0
    assert json.loads((tmp_path / "ck/config.json").read_text())["dtype"] == saved
    assert {info.dtype for info in verify_manifest(tmp_path / "ck").parameters.values()} == {saved}
    assert (tmp_path / "ck/tokenizer_config.json").exists()
    cls = get_model("LlamaForCausalLM")
    config = cls.config_from_hf(CONFIG)
    expected = load_params(
        param_spec(config, saved), cls.weight_rules(config), SafetensorsSource(hf_dir)
    )
    params = load(tmp_path / "ck", saved)
    assert set(params) == set(expected)
    for name, param in params.items():
        np.testing.assert_array_equal(np.asarray(param), np.asarray(expected[name]))


def test_gguf(write_gguf: WriteGGUF, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    convert(str(write_gguf()), tmp_path / "ck")
    params = load(tmp_path / "ck", "float32")
    qkv = [weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    found = np.asarray(params["layers.0.attention.qkv.weight"])
    np.testing.assert_array_equal(found, np.concatenate(qkv))
    names = {path.name for path in (tmp_path / "ck").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_tied_matrix_may_be_there_twice(
    hf_dir: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    both = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    both["lm_head.weight"] = both["model.embed_tokens.weight"].copy()
    save_file(both, hf_dir / "model.safetensors")
    convert(str(hf_dir), tmp_path / "ck")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "one architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ({"quantization_config": "awq"}, r"quantised \(awq\)"),
        ({"architectures": "LlamaForCausalLM"}, "one architecture"),
        ({"hidden_size": 65}, "does not fit"),
        ({"num_hidden_layers": 2}, "missing tensor"),
        ({"num_hidden_layers": 1 << 30}, "only 11 tensors"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"tie_word_embeddings": False}, r"missing tensor 'lm_head\.weight'"),
    ],
)
def test_bad_directory(
    hf_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    message: str,
) -> None:
    (hf_dir / "config.json").write_text(json.dumps(CONFIG | config))
    assert main([str(hf_dir), str(tmp_path / "ck")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.replace("\\", "") in error
    assert not (tmp_path / "ck").exists()


def test_bad_arguments(hf_dir: Path, tmp_path: Path, write_gguf: WriteGGUF) -> None:
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "ck")]) == 2
    assert main([str(hf_dir / "config.json"), str(tmp_path / "ck")]) == 2
    assert main([str(hf_dir), str(hf_dir)]) == 2
    assert main([str(hf_dir), str(hf_dir / "config.json" / "ck")]) == 2
    convert(str(hf_dir), tmp_path / "ck")
    assert main([str(hf_dir), str(tmp_path / "ck")]) == 2
    assert main([str(hf_dir), str(tmp_path / "ck"), "--force"]) == 0
    with pytest.raises(CheckpointError, match="already"):
        convert(str(tmp_path / "ck"), tmp_path / "again")
    with pytest.raises(CheckpointError, match="pre-tokenizer"):
        convert(str(write_gguf(pre="unheard-of")), tmp_path / "other")


def test_not_enough_space(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="are free"):
        convert(str(hf_dir), tmp_path / "ck")


SLOW = """
import sys, time
from jaxllm.weights.assembly import Assembly
from jaxllm.weights.convert import main
original, reads = Assembly.read, 0
def read(self, name):
    global reads
    reads += 1
    if reads == int(sys.argv[3]):
        print("reading", flush=True)
        time.sleep(60)
    return original(self, name)
Assembly.read = read
main(sys.argv[1:3])
"""


def test_killed_in_the_middle(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(hf_dir), str(out / "ck"), "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"reading\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
    (left,) = os.listdir(out)
    assert left == f"ck.tmp-{child.pid}"
    with pytest.raises(CheckpointError, match="unfinished"):
        load_converted(out / left, {})
    convert(str(hf_dir), out / "ck")
    assert os.listdir(out) == ["ck"]
    load(out / "ck", "bfloat16")
